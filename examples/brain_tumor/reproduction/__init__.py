"""All trainings of the paper, their results side by side."""
