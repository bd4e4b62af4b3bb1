"""The losses as their papers define them: naive float64 functions, independent of the package.

Every loss takes ``embeddings`` (N, d), ``weight`` (C, d), both unnormalised, and ``labels`` (N,),
and returns the N losses before any reduction; autograd differentiates it, and what the authors
detach is detached here and says so. With K sub-centres, sub-centre k of class c is row c * K + k.
State and random draws are arguments; their updates have functions of their own. ``momentum`` is
always the share of the new batch. Past theta + m = pi this is the plain cosine, unless the paper
defines something else. "code" is the authors' own; numbers with a ? are from memory.
"""

import math

import mpmath as mp
import torch


def cosines(embeddings, weight):
    return (embeddings / lengths(embeddings)[:, None]) @ (weight / lengths(weight)[:, None]).T


def lengths(rows):
    return rows.square().sum(dim=1).sqrt()


def one_hot(labels, classes):
    return torch.arange(classes, device=labels.device) == labels[:, None]


def at_labels(matrix, labels):
    return matrix[torch.arange(len(labels)), labels]


def with_target(matrix, labels, target):
    """The matrix with ``target`` (N,) in the columns of the labels."""
    return torch.where(one_hot(labels, matrix.shape[1]), target[:, None], matrix)


def cross_entropy(logits, labels):
    return torch.logsumexp(logits, dim=1) - at_labels(logits, labels)


def softplus(x):
    """log(1 + exp(x)) as the logsumexp of 0 and x."""
    return torch.logsumexp(torch.stack([torch.zeros_like(x), x]), dim=0)


def shifted(cosine, margin, easy_margin=False):
    """cos(theta + margin); the codes' ``easy_margin``: cos(theta) where that is not positive."""
    value = torch.cos(torch.acos(cosine) + margin)
    return torch.where(cosine > 0, value, cosine) if easy_margin else value


def psi(theta, margin):
    """(-1)^k cos(m theta) - 2k on [k pi/m, (k + 1) pi/m]: 1612.02295 eq. 6, 1704.08063 eq. 7?."""
    k = torch.floor(margin * theta.detach() / math.pi).clamp(max=math.ceil(margin) - 1)
    return (1 - 2 * torch.remainder(k, 2)) * torch.cos(margin * theta) - 2 * k


def annealed_lambda(iteration, *, base=1000.0, gamma=0.12, power=1.0, minimum=5.0):
    """lambda = max(lambda_min, base (1 + gamma i)^-power); i is 1 in the first forward pass.

    The defaults are the A-Softmax code's; neither paper gives a schedule.
    """
    return max(minimum, base * (1 + gamma * iteration) ** -power)


def large_margin_softmax(embeddings, weight, labels, *, margin, annealing=0.0):
    """L-Softmax, 1612.02295 eq. 4-6: logits W_j x, the target |W_y| |x| psi(theta_y).

    Annealed (sec. 5.1?): |W_y| |x| (lambda cos + psi) / (1 + lambda). No bias, no scale (PML has
    one); the code adds 1e-9 to |W| |x|.
    """
    cosine = at_labels(cosines(embeddings, weight), labels)
    target = (psi(torch.acos(cosine), margin) + annealing * cosine) / (1 + annealing)
    size = lengths(embeddings) * lengths(weight)[labels]
    return cross_entropy(with_target(embeddings @ weight.T, labels, size * target), labels)


def sphereface(embeddings, weight, labels, *, margin, annealing=0.0):
    """A-Softmax, 1704.08063 eq. 7?: logits |x| cos(theta_j), target |x| psi(theta_y); |W_j| = 1.

    The same lambda as L-Softmax. The exact gradient, where the Caffe code rescales its coefficients
    and sends W the plain inner product's gradient.
    """
    cosine = cosines(embeddings, weight)
    target = psi(torch.acos(at_labels(cosine, labels)), margin)
    target = (target + annealing * at_labels(cosine, labels)) / (1 + annealing)
    return cross_entropy(lengths(embeddings)[:, None] * with_target(cosine, labels, target), labels)


def spherefacer(
    embeddings, weight, labels, *, margin, kind="v0", scale=None, detach_characteristic=False
):
    """SphereFace-R, 2109.05565 sec. 3?: logits r phi(theta_y) and r eta(theta_j).

    v0: phi = psi, eta = cos. v1: phi = cos(min(m theta, pi)), eta = cos. v2: phi = cos(theta_y),
    eta = cos(theta_j / m). r = ``scale`` with hard feature normalisation; with none or soft, r is
    |x| (None), and soft adds ``spherefacer_norm``. "Characteristic gradient detachment" keeps the
    values but takes the gradient of r cos(theta); the code always does, and multiplies hard
    and soft by lw / s.
    """
    cosine = cosines(embeddings, weight)
    theta = torch.acos(cosine)
    if kind == "v0":
        value = with_target(cosine, labels, psi(at_labels(theta, labels), margin))
    elif kind == "v1":
        angle = (margin * at_labels(theta, labels)).clamp(max=math.pi)
        value = with_target(cosine, labels, torch.cos(angle))
    else:
        value = with_target(torch.cos(theta / margin), labels, at_labels(cosine, labels))
    if detach_characteristic:  # opensphere spherefacer.py: d_theta under no_grad, cos + d_theta
        value = cosine + (value - cosine).detach()
    radius = lengths(embeddings)[:, None] if scale is None else scale
    return cross_entropy(radius * value, labels)


def spherefacer_norm(embeddings, *, scale, t):
    """Soft feature normalisation's t ||x| - s| as in the code; the paper's power is unverified."""
    return t * (lengths(embeddings) - scale).abs()


def sphereface2(
    embeddings,
    weight,
    labels,
    *,
    bias,
    margin,
    scale,
    t,
    balance,
    kind="C",
    detach_characteristic=False,
):
    """SphereFace2, 2108.01513 eq. 5? and appendix: with g(z) = 2 ((z + 1) / 2)^t - 1,

    lambda / r log(1 + exp(-(r p + b))) + (1 - lambda) / r sum_j!=y log(1 + exp(r n_j + b)).
    C: p = g(cos theta_y) - m, n_j = g(cos theta_j) + m. A: p = g(cos(min(theta_y + m, pi))), M:
    p = g(cos(min(m theta_y, pi))), both n_j = g(cos theta_j). The code is lw times this and
    detaches g in sphereface2.py but not in sphereface2c.py. wespeaker has no 1 / r, and for A
    n_j = g(cos(theta_j - m)).
    """

    def adjusted(z):
        return 2 * ((z + 1) / 2) ** t - 1

    cosine = cosines(embeddings, weight)
    target = at_labels(cosine, labels)
    if kind == "C":
        positive, negative = adjusted(target) - margin, adjusted(cosine) + margin
    else:
        theta = torch.acos(target)
        theta = theta + margin if kind == "A" else margin * theta
        positive, negative = adjusted(torch.cos(theta.clamp(max=math.pi))), adjusted(cosine)
    if detach_characteristic:  # opensphere sphereface2.py: cos_theta + d_theta for every class
        positive = target + (positive - target).detach()
        negative = cosine + (negative - cosine).detach()
    others = softplus(scale * negative + bias).masked_fill(one_hot(labels, len(weight)), 0.0)
    return (
        balance * softplus(-(scale * positive + bias)) + (1 - balance) * others.sum(dim=1)
    ) / scale


def sphereface2_bias(classes, *, margin, scale, t, balance, kind="C"):
    """The code's initial bias: where d loss / d b is 0 while every theta is pi / 2."""
    at_zero = 2 * 0.5**t - 1
    if kind == "C":
        positive, negative = scale * (at_zero - margin), scale * (at_zero + margin)
    else:
        theta = math.pi / 2 + margin if kind == "A" else margin * math.pi / 2
        g = 2 * ((math.cos(min(math.pi, theta)) + 1) / 2) ** t - 1
        positive, negative = scale * g, scale * at_zero
    z = balance / ((1 - balance) * (classes - 1))
    with mp.workdps(800):  # the code loses all digits where z > 1
        z, difference = mp.mpf(z), mp.mpf(positive) - negative
        root = mp.sqrt((1 - z) ** 2 + 4 * z * mp.exp(difference))
        return float(mp.log(2 * z) - negative - mp.log(1 - z + root))


def uniface(embeddings, weight, labels, *, bias, margin, scale, balance=1.0):
    """UniFace (UCE), ICCV 2023 eq. ?, no arXiv: one learned threshold b for all pairs.

    log(1 + exp(-(s (cos theta_y - m) - b))) + lambda sum_j!=y log(1 + exp(s cos theta_j - b)).
    The code also clamps s (cos - m) - b and s cos - b to [-s, s], which kills gradients beyond; its
    b starts at log(10 C r), r being the share of the classes it samples.
    """
    cosine = cosines(embeddings, weight)
    others = softplus(scale * cosine - bias).masked_fill(one_hot(labels, len(weight)), 0.0)
    positive = softplus(-(scale * (at_labels(cosine, labels) - margin) - bias))
    return positive + balance * others.sum(dim=1)


def li_arcface(embeddings, weight, labels, *, margin, scale):
    """Li-ArcFace (AirFace), 1907.12256 eq. 3?: logits s (pi - 2 theta) / pi, theta_y + m for y."""
    theta = torch.acos(cosines(embeddings, weight))
    theta = with_target(theta, labels, at_labels(theta, labels) + margin)
    return cross_entropy(scale * (math.pi - 2 * theta) / math.pi, labels)


def x2_softmax(embeddings, weight, labels, *, a, h, k, scale):
    """X2-Softmax, 2312.05281: the target's logit s (a (theta - h)^2 + k), the others' s cos.

    The code makes the target's from the arccosine without a gradient.
    """
    cosine = cosines(embeddings, weight)
    theta = torch.acos(at_labels(cosine, labels))
    return cross_entropy(scale * with_target(cosine, labels, a * (theta - h) ** 2 + k), labels)


def curricularface(embeddings, weight, labels, *, margin, scale, t):
    """CurricularFace, 2004.00288 eq. 4-7?: T = cos(theta_y + m), N_j = cos_j, or cos_j (t + cos_j)
    where cos_j > T. ``t`` is the already updated one and a constant (code: no_grad).

    The code takes cos theta_y - m sin m past theta_y = pi - m.
    """
    cosine = cosines(embeddings, weight)
    target = shifted(at_labels(cosine, labels), margin)
    negatives = torch.where(cosine > target[:, None], cosine * (t + cosine), cosine)
    return cross_entropy(scale * with_target(negatives, labels, target), labels)


def curricularface_t(t, cosine_of_targets, momentum):
    """Eq. 9: t <- a mean(cos theta_y) + (1 - a) t from t = 0, in training, before the loss.

    The paper prints a = 0.99, the code has 0.01, and the author says that the code is right
    (CurricularFace issue 8).
    """
    return momentum * cosine_of_targets.detach().mean() + (1 - momentum) * t


def mv_softmax(
    embeddings, weight, labels, *, margin, scale, t, kind="arc", adaptive=True, easy_margin=False
):
    """MV-Softmax, 1912.00833 eq. 6-9?: a negative with cos_j > f(m, theta_y) is misclassified and
    gets s (cos_j + t (cos_j + 1)) when adaptive, s (cos_j + t) when fixed.

    f is cos(theta + m) ("arc") or cos(theta) - m ("am"). FaceX-Zoo's mv_weight is 1 + t. The code's
    default easy_margin drops the margin where cos theta_y <= 0 but still masks with it.
    """
    cosine = cosines(embeddings, weight)
    plain = at_labels(cosine, labels)
    target = shifted(plain, margin) if kind == "arc" else plain - margin
    harder = cosine + t * (cosine + 1) if adaptive else cosine + t
    negatives = torch.where(cosine > target[:, None], harder, cosine)
    if easy_margin:
        target = torch.where(plain > 0, target, plain)
    return cross_entropy(scale * with_target(negatives, labels, target), labels)


def npcface(embeddings, weight, labels, *, margin, scale, m0, m1, t, a, easy_margin=False):
    """NPCFace, 2007.10172 eq. ?: target cos(theta_y + m0 + m1 (mean cosine of the hard negatives)),
    hard negatives (cos_j > cos(theta_y + m)) t cos_j + a; the mean is 0 when there are none.

    ``margin`` is the mask's alone. m0 + m1 (...) is detached (FaceX-Zoo, by the paper's authors:
    no_grad); that code has easy_margin.
    """
    cosine = cosines(embeddings, weight)
    plain = at_labels(cosine, labels)
    hard = (cosine > shifted(plain, margin)[:, None]) & ~one_hot(labels, len(weight))
    mean = (cosine * hard).sum(dim=1) / hard.sum(dim=1).clamp(min=1)
    target = shifted(plain, (m0 + m1 * mean).detach(), easy_margin)
    negatives = torch.where(hard, t * cosine + a, cosine)
    return cross_entropy(scale * with_target(negatives, labels, target), labels)


def adacos(embeddings, weight, labels, *, scale):
    """AdaCos, 1905.00292 eq. 1?: cross entropy of s cos(theta_j), no margin; s is a constant."""
    return cross_entropy(scale * cosines(embeddings, weight), labels)


def adacos_fixed_scale(classes):
    """Eq. 12?: sqrt(2) log(C - 1), the fixed AdaCos and the dynamic one's start."""
    return math.sqrt(2) * math.log(classes - 1)


def adacos_scale(scale, cosine, labels):
    """Eq. 13-15?: s <- log B / cos(min(pi / 4, median theta_y)), in training, before the loss.

    B = mean over rows of sum_j!=y exp(s_old cos_j); the median is torch's, the lower one. Early
    versions of 4uiiurz1 took the median of all angles (issue 4) and let eval update.
    """
    cosine = cosine.detach()
    total = (scale * cosine).exp().masked_fill(one_hot(labels, cosine.shape[1]), 0.0).sum(dim=1)
    angle = torch.acos(at_labels(cosine, labels)).median().clamp(max=math.pi / 4)
    return torch.log(total.mean()) / torch.cos(angle)


def adaface(
    embeddings, weight, labels, *, margin, scale, h, mean, std, eps=0.0, clip=(0.0, math.inf)
):
    """AdaFace, 2204.00964 eq. 13-18?: z = clip((|x| - mean) / (std / h), -1, 1), target
    s (cos(theta_y - m z) - (m z + m)); eq. 18 misprints the brackets (AdaFace issue 10).

    z is detached (paper sec. 3.3?, code: safe_norms.detach()). The code has ``eps`` 1e-3 on std,
    ``clip`` (0.001, 100) on the norms, and clamps the cosine and theta to 1e-3 from the ends.
    ``mean`` and ``std`` are the already updated ones.
    """
    quality = (lengths(embeddings).detach().clamp(*clip) - mean) / (std + eps) * h
    quality = quality.clamp(-1, 1)
    cosine = cosines(embeddings, weight)
    target = shifted(at_labels(cosine, labels), -margin * quality) - margin * (1 + quality)
    return cross_entropy(scale * with_target(cosine, labels, target), labels)


def adaface_statistics(mean, std, embeddings, momentum, clip=(0.0, math.inf)):
    """mean <- a batch mean + (1 - a) mean, std likewise (unbiased), before the loss.

    The code starts at mean 20, std 100, with a = 0.01 in its README and 1.0 by default; the paper
    says 0.99 (issue 155, unanswered).
    """
    norms = lengths(embeddings).detach().clamp(*clip)
    return (
        momentum * norms.mean() + (1 - momentum) * mean,
        momentum * norms.std() + (1 - momentum) * std,
    )


def magface(embeddings, weight, labels, *, scale, l_a, u_a, l_margin, u_margin, easy_margin=False):
    """MagFace, 2103.06627 eq. 3?: ArcFace with m(a) linear from l_margin at a = l_a to
    u_margin at u_a; a = |x| clamped to [l_a, u_a] and not detached, so the norm learns from it.

    The code's default easy_margin is True. Add lambda_g ``magface_g``.
    """
    norms = lengths(embeddings).clamp(l_a, u_a)
    margin = l_margin + (u_margin - l_margin) / (u_a - l_a) * (norms - l_a)
    cosine = cosines(embeddings, weight)
    target = shifted(at_labels(cosine, labels), margin, easy_margin)
    return cross_entropy(scale * with_target(cosine, labels, target), labels)


def magface_g(embeddings, *, l_a, u_a):
    """g(a) = 1 / a + a / u_a^2 of the same clamped, undetached norm, without lambda_g."""
    norms = lengths(embeddings).clamp(l_a, u_a)
    return 1 / norms + norms / u_a**2


def circle(embeddings, weight, labels, *, margin, gamma):
    """Circle loss with class labels, 2002.10857 eq. 5-8: log(1 + sum_j!=y exp(gamma a_n,j
    (s_j - m)) exp(-gamma a_p (s_y - (1 - m)))), a_p = [1 + m - s_y]+, a_n = [s_j + m]+.

    The a are constants in the paper's gradient (eq. 9-10?: gamma (s_n + m)), so detached.
    """
    cosine = cosines(embeddings, weight)
    plain = at_labels(cosine, labels)
    target = (1 + margin - plain).detach().clamp(min=0) * (plain - (1 - margin))
    negatives = (cosine + margin).detach().clamp(min=0) * (cosine - margin)
    return cross_entropy(gamma * with_target(negatives, labels, target), labels)


def elasticface(embeddings, weight, labels, *, margins, scale, kind="arc"):
    """ElasticFace, 2109.09416 eq. 4-6?: ArcFace or CosFace with one margin for each sample,
    drawn from N(m, sigma) at each iteration and not clipped."""
    cosine = cosines(embeddings, weight)
    plain = at_labels(cosine, labels)
    target = shifted(plain, margins) if kind == "arc" else plain - margins
    return cross_entropy(scale * with_target(cosine, labels, target), labels)


def elasticface_plus_margins(draws, cosine_of_targets, *, as_released=False):
    """ElasticFace+: the sample furthest from its centre gets the largest draw, and so on.

    The released code indexes the ascending draws by the order of the cosines, descending, where the
    ranks are meant: the inverse permutation. ``as_released`` does that.
    """
    order = cosine_of_targets.detach().argsort(descending=True)
    ascending = draws.sort().values
    if as_released:
        return ascending[order]
    margins = torch.empty_like(draws)
    margins[order] = ascending
    return margins


def subcenters(embeddings, weight, sub_centers):
    """(N, C): the largest cosine over each class's sub-centres."""
    every = cosines(embeddings, weight)
    return every.reshape(len(embeddings), -1, sub_centers).max(dim=2).values


def subcenter_arcface(embeddings, weight, labels, *, margin, scale, sub_centers):
    """Sub-centre ArcFace, ECCV 2020 eq. 2?: ArcFace on theta_j = acos(max_k W_jk x); one margin, or
    (C,) margins for the landmark solution and KappaFace (with sub_centers 1)."""
    cosine = subcenters(embeddings, weight, sub_centers)
    margin = margin[labels] if torch.is_tensor(margin) else margin
    target = shifted(at_labels(cosine, labels), margin)
    return cross_entropy(scale * with_target(cosine, labels, target), labels)


def inter_topk(embeddings, weight, labels, *, margin, scale, penalty, k, kind="arc", sub_centers=1):
    """Inter-top-k, 2110.05042 eq. 8-10?: the k largest cosines among the other classes become
    cos(theta_j - m') ("arc", target cos(theta_y + m)) or cos_j + m' ("cos", target cos_y - m).

    wespeaker (arc) scales m' with its margin warm-up and drops the penalty in large-margin
    fine-tuning.
    """
    cosine = subcenters(embeddings, weight, sub_centers)
    mine = one_hot(labels, cosine.shape[1])
    chosen = cosine.detach().masked_fill(mine, -math.inf).topk(k, dim=1).indices
    top = torch.zeros_like(cosine).scatter(1, chosen, 1.0) > 0
    plain = at_labels(cosine, labels)
    target = shifted(plain, margin) if kind == "arc" else plain - margin
    closer = shifted(cosine, -penalty) if kind == "arc" else cosine + penalty
    negatives = torch.where(top, closer, cosine)
    return cross_entropy(scale * with_target(negatives, labels, target), labels)


def p2sgrad(embeddings, weight, labels):
    """P2SGrad, 1905.02479 eq. 11 is a gradient, sum_j (cos_j - [j = y]) grad cos_j: half that of
    this sum_j (cos_j - [j = y])^2, which is PML's times C."""
    cosine = cosines(embeddings, weight)
    return (cosine - one_hot(labels, len(weight)).to(cosine)).square().sum(dim=1)


def ldam(embeddings, weight, labels, *, margins, scale):
    """LDAM, 1906.07413 eq. 13?: CosFace with a margin for each class, on cosines as in the code.

    The code passes class weights to its cross entropy in the deferred phase (DRW).
    """
    cosine = cosines(embeddings, weight)
    target = at_labels(cosine, labels) - margins[labels]
    return cross_entropy(scale * with_target(cosine, labels, target), labels)


def ldam_margins(counts, *, max_margin):
    """Delta_c = K / n_c^(1/4), K such that the rarest class has ``max_margin`` (as the code)."""
    margins = counts.double() ** -0.25
    return max_margin * margins / margins.max()


def landmark_margins(counts, *, a, b, power):
    """Dynamic margins, 2010.05350 sec. 2.2?: m_c = a n_c^-lambda + b, for sub-centre ArcFace."""
    return a * counts.double() ** -power + b


def landmark_coefficients(counts, *, low, high, power):
    """The a and b that give the largest class ``low`` and the smallest ``high`` (as the code)."""
    powers = counts.double() ** -power
    a = (high - low) / (powers.max() - powers.min())
    return a, low - a * powers.min()


def kappaface(embeddings, weight, labels, *, margins, scale):
    """KappaFace, 2201.07394: ArcFace with the (C,) margins of ``kappaface_margins``; constants."""
    return subcenter_arcface(embeddings, weight, labels, margin=margins, scale=scale, sub_centers=1)


def kappaface_memory(memory, embeddings, momentum):
    """The batch's rows of the memory: (1 - a) row + a x / |x|, normalised again (code: a = 0.9)."""
    rows = (1 - momentum) * memory + momentum * embeddings / lengths(embeddings)[:, None]
    return (rows / lengths(rows)[:, None]).detach()


def kappaface_concentration(memory, labels, classes):
    """kappa_c = r (d - r^2) / (1 - r^2), r_c = |sum of c's unit rows| / n_c: von Mises-Fisher's.

    The code replaces inf by the largest finite kappa and nan by 0.
    """
    hot = one_hot(labels, classes).to(memory)
    r = lengths(hot.T @ memory) / hot.sum(dim=0)
    return r * (memory.shape[1] - r**2) / (1 - r**2)


def kappaface_margins(kappa, counts, *, margin, temperature, gamma, headroom=1.05):
    """m_c = m0 (gamma w_k + (1 - gamma) w_s), w_k = 1 - sigmoid(T (kappa - mean) / std), w_s =
    (cos(pi n_c / K) + 1) / 2, K = headroom max n (the code's 1.05); std is unbiased.

    The code recomputes them at the end of every epoch and uses m0 itself in the first.
    """
    standard = (kappa - kappa.mean()) / kappa.std()
    hardness = 1 - torch.sigmoid(temperature * standard)
    counts = counts.to(kappa)
    rarity = (torch.cos(math.pi * counts / (headroom * counts.max())) + 1) / 2
    return margin * (gamma * hardness + (1 - gamma) * rarity)
