import angular_losses as al


def test_available_lists_every_loss_with_a_line():
    listed = al.available()
    assert list(listed) == sorted(listed)
    public = {
        name
        for name, value in vars(al).items()
        if isinstance(value, type) and issubclass(value, al.MarginLoss)
    }
    assert set(listed) == public - {"MarginLoss"}
    assert all(line.endswith(".") and 20 < len(line) < 100 for line in listed.values())
