"""The catalogue: every published method as one entry of known parts.

An entry is a function from the method's settings to a `Method`: its docstring says what the method is, its fields
which paper and equation it is from, what it assumes and when it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from eckart.lowrank.entries import build_entry, entry_options
from eckart.lowrank.method import Method, Stage
from eckart.lowrank.metrics import (
    absolute_mean_root,
    eigen_root,
    fisher_input_root,
    fisher_output_metric,
    gradient_metric,
    of_second_moment,
    scaled_eigenvectors,
    whitening,
)
from eckart.lowrank.moments import TOKEN_WEIGHTS

SECOND_MOMENT = frozenset({"second_moment"})
NSVD_PAPER = "Large Language Model Compression via the Nested Activation-Aware Decomposition (2025)"
SFSD_PAPER = "Surgical Feature-Space Decomposition of LLMs: Why, When and How? (2024)"
# Most papers give the first stage 95 % of the rank (NSVD Table 1).
FIRST_SHARE = 0.95
# An output metric is solved with. One per cent of the mean keeps a row whose Fisher information is zero solvable and
# hardly changes rows of ordinary weight.
FISHER_OUT_SHRINKAGE = 0.01
# Starting points of METHODS' two-sided metric; a gradient covariance has fewer effective samples than an input moment,
# and without shrinkage the method collapses on recent models (GFWSVD's own results on Llama-3).
INPUT_SHRINKAGE, GRADIENT_SHRINKAGE = 0.1, 0.3
# How far the anchored target's moments are shrunk at least, see `anchored`.
ANCHOR_SHRINKAGE = INPUT_SHRINKAGE


def svd() -> Method:
    """Plain truncated SVD of the weight: the best approximation of the weight itself, blind to its inputs."""
    return Method(
        name="svd",
        paper="Eckart and Young, Psychometrika 1 (1936); the baseline of all three papers",
        equation="W2 = U sqrt(S), W1 = sqrt(S) V^T (same product as U, U^T W here)",
        assumes="every input direction matters alike",
        fails="activations with outliers: perplexity explodes on 7B models from keep 0.9 on",
        stage=Stage(),
    )


def fwsvd(fisher_axis: Literal["in", "out"] = "in") -> Method:
    """SVD weighted by the Fisher information of the weight's input features (or of its output features)."""
    common: dict[str, Any] = {
        "name": "fwsvd",
        "paper": "Hsu et al., Language model compression with weighted low-rank factorization, arXiv 2207.00112",
        "assumes": "the loss is locally quadratic with a Fisher matrix that is diagonal and separable by rows",
        "fails": "rows that the calibration loss never touches get no weight; worse than svd on large decoders",
        "options": {"fisher_axis": fisher_axis},
    }
    if fisher_axis == "in":
        return Method(
            equation="B = diag sqrt(sum of F over outputs)",
            needs=frozenset({"fisher_in"}),
            stage=Stage(root=fisher_input_root),
            **common,
        )
    if fisher_axis == "out":
        return Method(
            equation="A = diag sqrt(sum of F over inputs)",
            needs=frozenset({"fisher_out"}),
            stage=Stage(metric=partial(fisher_output_metric, share=FISHER_OUT_SHRINKAGE)),
            **common,
        )
    raise ValueError(f"fwsvd: fisher_axis is 'in' or 'out', not {fisher_axis!r}")


def asvd_0(alpha: float = 0.5) -> Method:
    """SVD with every input channel scaled by its mean absolute activation to the power alpha."""
    return Method(
        name="asvd-0",
        paper="Yuan et al., ASVD, arXiv 2312.05821 (alpha = 0.5); NSVD Eq. 4 (alpha = 1)",
        equation="B = diag(E|x|^alpha)",
        assumes="channels are important in proportion to a power of their size; correlations are ignored",
        fails="keep below about 0.8 on 7B models",
        needs=frozenset({"abs_mean"}),
        stage=Stage(root=partial(absolute_mean_root, alpha=alpha)),
        options={"alpha": alpha},
    )


def asvd_i() -> Method:
    """Least output error on the calibration tokens, through the Cholesky root (SVD-LLM's whitening)."""
    return Method(
        name="asvd-i",
        paper="Wang et al., SVD-LLM, arXiv 2403.07378; NSVD Theorem 2",
        equation="B = chol(G), B B^T = E[x x^T]",
        assumes="calibration inputs look like the inputs of use",
        fails="out of the calibration domain (NSVD Table 1); a singular G falls back to the eigenvalue root",
        needs=SECOND_MOMENT,
        stage=Stage(root=whitening()),
        exact=True,
    )


def asvd_ii() -> Method:
    """Least output error on the calibration tokens, through the eigenvalue root. Equals asvd-i."""
    return Method(
        name="asvd-ii",
        paper="NSVD Theorem 3",
        equation="B = P Lambda^(1/2), P Lambda P^T = E[x x^T]",
        assumes="as asvd-i; a singular G is no special case",
        fails="as asvd-i",
        needs=SECOND_MOMENT,
        stage=Stage(root=of_second_moment(eigen_root)),
        exact=True,
    )


def asvd_iii() -> Method:
    """The eigenvectors of the inputs without their eigenvalues. Orthogonal, so it equals plain SVD for every gamma."""
    return Method(
        name="asvd-iii",
        paper="NSVD Theorem 4",
        equation="B = gamma P",
        assumes="nothing that plain SVD does not",
        fails="where svd fails; kept because the paper has it, and tested to equal svd",
        needs=SECOND_MOMENT,
        stage=Stage(root=of_second_moment(scaled_eigenvectors)),
    )


def _nested(name: str, base: Method, residual: Stage, share: float, what: str) -> Method:
    return Method(
        name=name,
        paper=f"{NSVD_PAPER}, {what}",
        equation="M1 of rank k1 = round(share k), then k - k1 ranks on W - M1, stored as one pair [L1 L2] [R1; R2]",
        assumes="the calibration domain is not the whole use; the second stage guards the weight itself",
        fails="in the calibration domain it costs what the second stage's ranks would have saved there",
        needs=base.needs,
        stage=base.stage,
        residual=residual,
        share=share,
        options={"share": share},
    )


def nsvd_i(share: float = FIRST_SHARE) -> Method:
    """asvd-i for most of the rank, plain SVD of the residual for the rest."""
    return _nested("nsvd-i", asvd_i(), Stage(), share, "Eq. 5 over Theorem 2")


def nsvd_ii(share: float = FIRST_SHARE) -> Method:
    """asvd-ii for most of the rank, plain SVD of the residual for the rest. Equals nsvd-i."""
    return _nested("nsvd-ii", asvd_ii(), Stage(), share, "Eq. 5 over Theorem 3")


def nid_i(share: float = FIRST_SHARE) -> Method:
    """asvd-i for most of the rank, a column interpolative decomposition of the residual for the rest."""
    return _nested("nid-i", asvd_i(), Stage(interpolative=True), share, "section 3, over Theorem 2")


def nid_ii(share: float = FIRST_SHARE) -> Method:
    """asvd-ii for most of the rank, a column interpolative decomposition of the residual for the rest."""
    return _nested("nid-ii", asvd_ii(), Stage(interpolative=True), share, "section 3, over Theorem 3")


def sfsd(centred: bool = True) -> Method:
    """Principal components of the centred layer output; the mean of what is dropped goes to a bias.

    With `centred` False the components are those of E[y y^T], as the equations before Eq. 4 have them, with the same
    bias. The paper's S_k, the variance along a component, is then not its eigenvalue, as the paper says it is: the
    eigenvalue has the squared mean besides, which the bias restores. It spends rank on what the bias gives for free.
    """
    if not centred:
        return Method(
            name="sfsd",
            paper=SFSD_PAPER,
            equation="Eq. 4-5: B a root of G, d = W mu - M mu",
            assumes="as asvd-i; the bias costs nothing that its rank could have had",
            fails="never better than centred on the calibration tokens at the same rank",
            needs=SECOND_MOMENT,
            stage=Stage(root=whitening()),
            centred=True,
            options={"centred": False},
        )
    return Method(
        name="sfsd",
        paper=SFSD_PAPER,
        equation="Eq. 4-5: B a root of C = G - mu mu^T, d = W mu - M mu",
        assumes="as asvd-i; never worse than it on the calibration tokens at the same rank",
        fails="as asvd-i; the bias is one more vector per layer where there was none",
        needs=SECOND_MOMENT,
        stage=Stage(root=whitening(centred=True)),
        centred=True,
        exact=True,
        options={"centred": True},
    )


def feature_space() -> Method:
    """Principal components of the uncentred layer output, no bias: SFSD's method without its mean. Equals asvd-i."""
    return Method(
        name="feature-space",
        paper=f"{SFSD_PAPER}, Table 1 without the bias",
        equation="U = eigenvectors of E[y y^T] = W G W^T",
        assumes="as asvd-i",
        fails="as asvd-i",
        needs=SECOND_MOMENT,
        stage=Stage(root=of_second_moment(eigen_root)),
        exact=True,
    )


def shrunk(share: float = INPUT_SHRINKAGE, bias: bool = False) -> Method:
    """asvd-i with its moment shrunk towards the mean diagonal: nested decomposition's guard, without its ranks."""
    return Method(
        name="shrunk",
        paper="the smooth cousin of NSVD: Ledoit and Wolf's shrinkage (2004) of SVD-LLM's moment",
        equation="B B^T = (1 - share) G + share mean(diag G) I" + (", centred, d = W mu - M mu" if bias else ""),
        assumes="directions that the calibration text does not use may be used elsewhere, all alike",
        fails="where calibration and use agree it gives away what the shrinkage costs; share 1 is plain svd",
        needs=SECOND_MOMENT,
        stage=Stage(root=whitening(share, centred=bias)),
        centred=bias,
        shrinkage=share,
        options={"share": share, "bias": bias},
    )


def kfac(
    shrink_in: float = INPUT_SHRINKAGE,
    shrink_out: float = GRADIENT_SHRINKAGE,
    bias: bool = True,
    weighted: bool = True,
) -> Method:
    """Error weighed by the inputs' moment and by the loss gradient's: its tail is in units of the loss."""
    mean = "E[|g| {}] / E[|g|]" if weighted else "E[{}]"
    weights = frozenset({TOKEN_WEIGHTS}) if weighted else frozenset[str]()
    return Method(
        name="kfac",
        paper="Kronecker-factored Fisher (Martens and Grosse, arXiv 1503.05671) as a metric; GFWSVD, arXiv 2505.17974",
        equation=f"A^T A = shrunk E[g g^T], B B^T = shrunk {mean.format('x x^T')}"
        + (f" - mu mu^T, mu = {mean.format('x')}, d = W mu - M mu" if bias else ""),
        assumes="the loss is locally quadratic, inputs and gradients of a linear are uncorrelated"
        + (" but for the gradients' size, by which tokens are weighted" if weighted else ""),
        fails="on few tokens the gradient's covariance is noise: shrink it more; needs backward passes",
        needs=SECOND_MOMENT | {"gradient_covariance"} | weights,
        stage=Stage(
            root=whitening(shrink_in, centred=bias),
            metric=partial(gradient_metric, share=shrink_out),
        ),
        centred=bias,
        shrinkage=shrink_in,
        options={"shrink_in": shrink_in, "shrink_out": shrink_out, "bias": bias, "weighted": weighted},
    )


def anchored(method: Method) -> Method:
    """The method fit to the dense model's outputs on the compressed model's inputs.

    The target's moments are shrunk as far as the method shrinks its own input moment, so that both speak of the same
    inputs, and no less than ANCHOR_SHRINKAGE.
    """
    return method.anchored(max(method.shrinkage, ANCHOR_SHRINKAGE))


METHODS: dict[str, Callable[..., Method]] = {
    "svd": svd,
    "fwsvd": fwsvd,
    "asvd-0": asvd_0,
    "asvd-i": asvd_i,
    "asvd-ii": asvd_ii,
    "asvd-iii": asvd_iii,
    "nsvd-i": nsvd_i,
    "nsvd-ii": nsvd_ii,
    "nid-i": nid_i,
    "nid-ii": nid_ii,
    "sfsd": sfsd,
    "feature-space": feature_space,
    "shrunk": shrunk,
    "kfac": kfac,
}


def method_options(name: str) -> dict[str, Any]:
    """{setting: default} of a method. Raises ValueError on an unknown name, with the nearest known one."""
    return entry_options(METHODS, "method", name)


def build_method(name: str, options: dict[str, Any] | None = None) -> Method:
    """The catalogue's method `name` with its settings.

    Raises:
        ValueError: an unknown method or setting (the message has the nearest known name), or a bad value.
    """
    return build_entry(METHODS, "method", name, options)
