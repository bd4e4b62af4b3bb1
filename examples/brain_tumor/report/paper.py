"""What the paper printed: its tables, what follows from them, and where it contradicts itself.

Verma and Singh, "HSADML: Hyper-Sphere Angular Deep Metric based Learning for Brain Tumor
Classification". Cells are kept as they were printed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..evaluation.metrics import compute_metrics, metrics_row, ratio_text

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
# Rows are the truth. By search each is the only one that fits its printed row, misprints apart, but
# for two. That of Modified SoftMax is the only one that fits its AUCs in Table 4, for its row in
# Table 3 is another's. Twelve fit the row of 30-70, alike but for which classes were mistaken for
# which.
CONFUSIONS = {
    "sphereface-m5": ((208, 2, 7), (1, 421, 0), (2, 0, 279)),
    "softmax": ((207, 1, 9), (3, 418, 1), (0, 0, 281)),
    "sphereface-m4": ((208, 3, 6), (4, 418, 0), (1, 0, 280)),
    "sphereface-m6": ((204, 2, 11), (2, 420, 0), (1, 0, 280)),
    "modified-softmax": ((207, 0, 10), (2, 419, 1), (2, 0, 279)),
    "triplet": ((209, 1, 7), (3, 419, 0), (2, 0, 279)),
    "sphereface-m5-swapped": ((437, 26, 28), (30, 974, 0), (2, 11, 636)),
    "random forest": ((206, 4, 7), (1, 421, 0), (2, 0, 279)),
    "SVM polynomial": ((210, 0, 7), (5, 417, 0), (4, 0, 277)),
}

# Where the counts do not give what the paper printed, and why.
EXPLANATIONS = {
    "sphereface-m5, AUC": "the average is that of the three cells as they are cut off",
    "sphereface-m4": "rounded and not cut off",
    "modified-softmax": "the paper's row is the random forest's; Table 4 has the counts' AUCs",
    "triplet": "misprints: the F1 follows from no counts, and the MCC has two digits exchanged",
    "triplet, AUC": "a misprint: the three cells beside it have the average .9881 too",
    "random forest": ".9941 is rounded; .9846 is a misprint, it follows from no counts",
    "SVM polynomial": "a misprint: it follows from no counts",
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
    "With another budget than the paper's: other settings, as said above and in the settings "
    "below, and the paper's own recipe in a row of its own.",
    "By patient, the seventh training (30-70 by slice) exchanges the sides too: it is trained on "
    "one fold and tested on the other four, which is 20-80.",
)

CONTRADICTIONS = (
    "The text calls the images FLAIR; the data set is T1-weighted with contrast agent.",
    "The split is by slice, so slices of one patient are in training and test set; the text does "
    "not say so. Here the same trainings are also run with a split by patient.",
    "MCC of the proposed training: .9762 in the text and .9796 in Table 1; its counts give .9796.",
    "Triplet's MCC .9797 would beat the proposed .9796; its counts give .9779, so two digits "
    "were exchanged.",
    "Three values of F1 follow from no counts with the recall beside them, and those that fit the "
    "rest of the row give others: Triplet's of pituitary .9891 (.9841), the random forest's of "
    "pituitary .9846, and so Modified SoftMax's in Table 3 (.9841), and the polynomial SVM's of "
    "meningioma .9630 (.9633).",
    "The row of Modified SoftMax in Table 3 repeats that of the random forest in Table 2 digit "
    "for digit, and gives a gain of 0.22 % where the text has 0.33 %. Its AUCs in Table 4 fit one "
    "set of counts alone, with 15 errors, which is 0.33 % below the proposed training's 12. So the "
    "text and Table 4 are taken, and Table 3 for a slip in copying.",
    "The average accuracy is that of all slices and not the mean of the classes', which is 98.30 "
    "for the proposed training. The values are cut off after the last digit, but F1 of glioma is "
    "rounded for m = 4 (.9917) and the random forest (.9941).",
    "The text says that HSADML does better for each class. Figure 7 plots averages alone, and in "
    "Table 3 Triplet has the better recall of meningioma and SoftMax of pituitary.",
    "The text takes 70-30 from most previous works, [4] among them; by its abstract [4] (Deepak "
    "and Ameer) tests in five folds by patient.",
    "The abstract speaks of validation accuracy; by Section 3 the slices are the test's.",
    "The abstract blames high similarity within the classes, the introduction high variability; "
    "the latter is meant.",
    "Section 2.2 calls what BatchNorm gives the embeddings, Section 2.3 takes them from the dense "
    "layer before it. The former is done here: it is what the loss was given.",
    "The average AUC of m = 5 is .9882 in Table 4 and .9881 in Table 6; its counts give .9883. "
    "Triplet's is .9880, and its counts give .9881.",
    "An SVM with a polynomial kernel of order 256 is degenerate: 256 is the number of features. "
    "Read as degree 3.",
    "What Tables 4 and 6 call AUC follows from hard labels, (TPR + TNR) / 2; the paper's formula "
    "of MCC is the binary one, its values are those of many classes (R_K); its accuracy per class "
    "is recall (by its formula meningioma of the proposed training would have 98.69, not 95.85).",
    "Equation (1) sums over j != i where j != y_i is meant, and W is d x N where d x C is meant. "
    "In equation (3) k is floor(m theta / pi), at most m - 1. Equation (6) calls the distances of "
    "(4) and (5) equal; the Euclidean is the root of twice the cosine one and orders alike.",
    "m >= 4 is not needed for anything in the equations: any m >= 1 is a margin.",
    "SphereFace keeps the length of x; the paper normalises x and scales by s.",
    "12 against 13, 14, 15 and 16 errors in 920 are no ranking: Wilson's 95 % intervals are 97.73 "
    "to 99.25 and 97.46 to 99.09 for 12 and 14 errors. The abstract calls 98.69 significantly "
    "higher than 98.47, but however these errors fall on the same slices, McNemar's exact p is at "
    "least .5, and at least .125 for 12 against 16.",
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
        "abstract (PMID 31279167), doi:10.1016/j.compbiomed.2019.103345",
        True,
    ),
    Cited(
        "Cheng et al. 2015, ring-form partition",
        0.9128,
        "tumour region given",
        "abstract (PMC4598126), doi:10.1371/journal.pone.0140381",
        True,
    ),
    Cited(
        "Afshar et al. 2019, capsule network",
        0.9089,
        "tumour box given",
        "doi:10.1109/ICASSP.2019.8683759; number from memory, not verified",
        False,
    ),
)


class Golden(NamedTuple):
    """A row of the paper's beside what our metrics make of its counts.

    Attributes:
        name: The training or classifier, and whether the cells are AUCs.
        printed: The paper's cells.
        ours: Of the counts.
        explanation: Why they differ; empty where they do not.
    """

    name: str
    printed: list[str]
    ours: list[str]
    explanation: str


def golden_check() -> list[Golden]:
    """Return each row of the paper's six tables once, beside our metrics of its counts."""
    printed = {**BY_TRAINING, **CLASSIFIERS}
    rows = []
    for name, confusion in CONFUSIONS.items():
        metrics = compute_metrics(np.array(confusion))
        rows.append((name, printed[name], metrics_row(vars(metrics))))
        if name in AUCS:
            areas = [*metrics.label_auc, float(np.mean(metrics.label_auc))]
            rows.append((f"{name}, AUC", AUCS[name], [ratio_text(area) for area in areas]))
    return [Golden(*row, EXPLANATIONS.get(row[0], "")) for row in rows]
