"""Training diagnostics: angles, margins, class centres and gradients, in total and per class.

:class:`AngularMonitor` collects them during training; the underlying functions and the plots are
available too. Angles are in radians; plots have axes in degrees and radians.
"""

from ..separation import separation_bound as separation_bound
from .measures import BatchAngles as BatchAngles
from .measures import CentreSeparation as CentreSeparation
from .measures import CollapsedClasses as CollapsedClasses
from .measures import angle_histogram as angle_histogram
from .measures import batch_angles as batch_angles
from .measures import centre_separation as centre_separation
from .measures import collapsed_classes as collapsed_classes
from .measures import effective_margin as effective_margin
from .measures import gradient_norm_per_class as gradient_norm_per_class
from .measures import histogram_quantile as histogram_quantile
from .measures import margin_violations as margin_violations
from .monitor import AngularMonitor as AngularMonitor
from .monitor import Snapshot as Snapshot
from .plots import plot_angles as plot_angles
from .plots import plot_gradient_norms as plot_gradient_norms
from .plots import plot_history as plot_history
from .plots import plot_margin as plot_margin
from .plots import plot_separation as plot_separation
