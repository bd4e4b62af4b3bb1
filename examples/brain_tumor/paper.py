"""What the paper printed: its tables, what follows from them, and where it contradicts itself.

Verma and Singh, "HSADML: Hyper-Sphere Angular Deep Metric based Learning for Brain Tumor
Classification". Cells are kept as they were printed.
"""

from dataclasses import dataclass

import numpy as np

from .metrics import compute_metrics, metrics_row, ratio_text

ACCURACY = 0.9869  # the proposed training, 70-30: 908 of 920


def _cells(row: str) -> list[str]:
    return row.split()


_PROPOSED = _cells("95.85 99.76 99.28 98.69 .9719 .9964 .9841 .9841 .9869 .9796")
_REPEATED = _cells("94.93 99.76 99.28 98.47 .9671 .9941 .9846 .9817 .9847 .9762")

# Tables 1, 3 and 5: recall Me, Gl, Pt, accuracy, F1 Me, Gl, Pt, macro, micro, MCC.
BY_TRAINING = {
    "sphereface-m5": _PROPOSED,
    "sphereface-m5-swapped": _cells("89.00 97.01 97.99 95.47 .9104 .9667 .9687 .9486 .9547 .9289"),
    "softmax": _cells("95.39 99.05 100.00 98.47 .9695 .9940 .9825 .9820 .9847 .9763"),
    "modified-softmax": _REPEATED,
    "triplet": _cells("96.31 99.28 99.28 98.58 .9698 .9952 .9891 .9830 .9858 .9797"),
    "sphereface-m4": _cells("95.85 99.05 99.64 98.47 .9674 .9917 .9876 .9822 .9847 .9762"),
    "sphereface-m6": _cells("94.00 99.52 99.64 98.26 .9622 .9952 .9790 .9788 .9826 .9730"),
}
# Table 2, by the names of classifiers.py.
CLASSIFIERS = {
    "k-NN, k = 1": _PROPOSED,
    "k-NN, best k on the test slices": _PROPOSED,  # k = 1 was "the best possible"
    "SVM Gaussian": _PROPOSED,
    "SVM polynomial": _cells("96.77 98.81 98.57 98.26 .9630 .9940 .9805 .9792 .9826 .9729"),
    "random forest": _REPEATED,
}
# Tables 4 and 6: AUC Me, Gl, Pt, average.
AUCS = {
    "softmax": _cells(".9748 .9942 .9921 .9870"),
    "modified-softmax": _cells(".9741 .9964 .9878 .9861"),
    "triplet": _cells(".9780 .9954 .9909 .9880"),
    "sphereface-m5": _cells(".9771 .9968 .9909 .9882"),
    "sphereface-m4": _cells(".9757 .9922 .9935 .9871"),
    "sphereface-m6": _cells(".9679 .9956 .9896 .9843"),
}
# Rows are the truth. The first four are the only ones that fit their rows. Of the others the hits
# and the number of answers per class follow from recall and F1, and with them every printed cell;
# which classes were taken for which does not, so these are one choice of several.
CONFUSIONS = {
    "sphereface-m5": ((208, 2, 7), (1, 421, 0), (2, 0, 279)),
    "softmax": ((207, 1, 9), (3, 418, 1), (0, 0, 281)),
    "sphereface-m4": ((208, 3, 6), (4, 418, 0), (1, 0, 280)),
    "sphereface-m6": ((204, 2, 11), (2, 420, 0), (1, 0, 280)),
    "modified-softmax": ((206, 4, 7), (1, 421, 0), (2, 0, 279)),
    "triplet": ((209, 1, 7), (3, 419, 0), (2, 0, 279)),
    "sphereface-m5-swapped": ((437, 26, 28), (30, 974, 0), (2, 11, 636)),
}

DEVIATIONS = (
    "The network is fed [-1, 1], on which its ImageNet weights were trained; the paper says "
    "[0, 1] (`--input-range unit`).",
    "The margin is annealed (SphereFace's own schedule, lambda not below 5); the paper mentions "
    "none. The row without annealing stands among the losses beyond the paper.",
    "Not given in the paper, and chosen: batches of 32, ReLU after the first dense layer, "
    "rotation up to 15 degrees, brightness within 0.8 to 1.2, zoom up to 1.25, flips of both "
    "kinds with probability one half, FaceNet's semi-hard triplets with margin 0.2.",
    "The paper's seed cannot be recovered: each seed here draws a split with the paper's numbers "
    "of test slices per class (217, 422, 281).",
    "k-NN by cosine, which orders unit vectors as Euclidean distance does. The polynomial kernel "
    "has degree 3.",
    "With a smaller budget than the paper's: fewer epochs, smaller images, a higher learning rate "
    "with cosine decay, as said above and in the settings below.",
    "By patient, the seventh training (30-70 by slice) exchanges the sides too: it is trained on "
    "one fold and tested on the other four, which is 20-80.",
)

CONTRADICTIONS = (
    "The text calls the images FLAIR; the data set is T1-weighted with contrast agent.",
    "The split is by slice, so slices of one patient stand on both sides; the text does not say "
    "so. The same trainings by patient stand beside it here.",
    "MCC of the proposed training: .9762 in the text and .9796 in Table 1; its counts give .9796.",
    "The text gives 0.22 % and 0.33 % of gain over SoftMax and Modified SoftMax, but Table 3 "
    "prints 98.47 for both: 0.22 twice.",
    "Triplet's MCC .9797 would beat the proposed .9796; its counts give .9779, so two digits "
    "were exchanged.",
    "Triplet's F1 of pituitary .9891 does not go with the macro F1 .9830 beside it; the counts "
    "give .9841.",
    "The row of Modified SoftMax in Table 3 repeats that of the random forest in Table 2 digit "
    "for digit. Its F1 of pituitary .9846 does not go with its macro F1; the counts give .9841. "
    "Its AUCs in Table 4 (.9741, .9964, .9878) belong to other counts than Table 3's, which give "
    ".9725, .9947, .9909.",
    "F1 of meningioma of the polynomial SVM: .9630 printed, .9633 from its recall and the F1 of "
    "the other classes.",
    "The average AUC of m = 5 is .9882 in Table 4 and .9881 in Table 6.",
    "An SVM with a polynomial kernel of order 256 is degenerate: 256 is the number of features. "
    "Read as degree 3.",
    "What Tables 4 and 6 call AUC follows from hard labels, (TPR + TNR) / 2; the paper's formula "
    "of MCC is the binary one, its values are those of many classes (R_K); its accuracy per class "
    "is recall.",
    "Equation (1) sums over j != i where j != y_i is meant, and W is d x N where d x C is meant. "
    "In equation (3) k is floor(m theta / pi), at most m - 1.",
    "m >= 4 is not needed for anything in the equations: any m >= 1 is a margin.",
    "SphereFace keeps the length of x; the paper normalises x and scales by s.",
    "12 against 13, 14 and 16 errors in 920 are no ranking: Wilson's 95 % intervals are 97.73 to "
    "99.25 and 97.46 to 99.09 for 12 and 14 errors.",
)


@dataclass(frozen=True)
class Cited:
    """An accuracy on this data set that other authors give.

    Attributes:
        name: The method.
        accuracy: From 0 to 1.
        protocol: How it was tested.
        source: Where it was published.
        verified: Whether the number was read in the authors' own abstract; else it is from memory.
    """

    name: str
    accuracy: float
    protocol: str
    source: str
    verified: bool


CITED = (
    Cited(
        "Gumaei et al. 2019, hybrid features with RELM",
        0.94233,
        "random holdout",
        "abstract, doi:10.1109/ACCESS.2019.2904145",
        True,
    ),
    Cited(
        "Ismael and Abdel-Qader 2018, statistical features",
        0.919,
        "tumour region given",
        "abstract, doi:10.1109/EIT.2018.8500308",
        True,
    ),
    Cited(
        "Deepak and Ameer 2019, GoogLeNet features",
        0.98,
        "five folds by patient",
        "doi:10.1016/j.compbiomed.2019.103345; number from memory, not verified",
        False,
    ),
    Cited(
        "Afshar et al. 2019, capsule network",
        0.9089,
        "tumour box given",
        "doi:10.1109/ICASSP.2019.8683759; number from memory, not verified",
        False,
    ),
)


def golden_check() -> list[tuple[str, list[str], list[str]]]:
    """Return what the paper printed beside what our metrics make of its counts.

    Returns:
        For each row of Tables 1, 3 and 5 and of Tables 4 and 6: its name, the paper's cells, ours.
    """
    rows = []
    for training, confusion in CONFUSIONS.items():
        metrics = compute_metrics(np.array(confusion))
        rows.append((training, BY_TRAINING[training], metrics_row(vars(metrics))))
        if training in AUCS:
            areas = [*metrics.label_auc, float(np.mean(metrics.label_auc))]
            rows.append((f"{training}, AUC", AUCS[training], [ratio_text(area) for area in areas]))
    return rows
