"""Moments of an input: what calibration remembers of the tensor that a group of linears reads.

All statistics are running sums in float64, so that streams can be cut anywhere, merged with `+`, and normalised last.

Square sums are about the mean, and second moments are made of them: C + mu mu^T loses nothing, where G - mu mu^T is
rounding as soon as a feature varies by less than a thousandth of its mean. The mean is not known before the last batch,
so sums run about a shift near it, the first batch's mean, and are moved to the mean when they are read (shifted data;
Chan, Golub and LeVeque 1983).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eckart.lowrank.deviations import CHUNK_ROWS, Deviations, exact_parts, rows_of, shift_for, widened
from eckart.lowrank.float32 import (
    add_gram,
    exact_products,
    full_float32,
    inner_product,
    mirror,
    symmetric_trace,
)

# Rows of a square sum that are normalised at a time: no second copy of it in float64 is made on the way, and these rows
# stay in a cache.
NORMALISED_ROWS = 64
# Rows whose sizes are summed at a time: a copy of them fits a cache, one of all would be fetched from the system anew.
SIZED_ROWS = 512
# The square sums of an input that are symmetric; of these only the upper block triangle is added to, and mirrored when
# they are read.
SYMMETRIC = ("covariance", "reference_covariance")
# Rows that a moment without any counts as, where it is asked how often it is used.
UNUSED = 0.5
# The names of the two streams' means.
STREAMS = ("mean", "reference_mean")
# Before the name of a stream's mean, in `InputMoments.running`.
SHIFT = "shift of "
# Square sums, and of which streams' deviations each is: rows, columns.
SQUARES = {
    "covariance": ("mean", "mean"),
    "cross_covariance": ("reference_mean", "mean"),
    "reference_covariance": ("reference_mean", "reference_mean"),
}

# What a method may ask for, of a layer's input; it is shared by every layer that reads the same tensor.
INPUT_STATISTICS = frozenset({"mean", "abs_mean", "second_moment", "cross_moment"})


class InputMoments:
    """Streamed statistics of the tensor that one input group of layers reads (q, k and v share one).

        mean mu = E[x],  abs_mean a = E[|x|],  covariance C = E[(x - mu)(x - mu)^T],  second_moment G = C + mu mu^T,
        cross_moment X = E[x xh^T]   (x in the dense model, xh the same input in the compressed one)

    With a reference stream (`update(xh, reference=x)`), mean / second_moment are of xh, `reference_mean` of x.

    Rows may have weights (`update(x, weights=w)`), as the tokens of one expert have: E is sum w x / sum w then, and
    `use` what the rows weigh among all that there were.

    Args:
        d_in: width of the input.
        needs: names out of INPUT_STATISTICS; the mean and the absolute mean cost nothing and are always kept.
        device: where the inputs will be.
        reference: moments of the reference stream on the tokens that will be seen, where they are known already: they
            are not summed again then.
        dtype: of the square sums.

    Accuracy: a variance is off by 3e-7 of itself, times at most 1 + tokens / tokens of the first batch, whatever the
    mean is: the shift is no further from it. Of 16-bit inputs, where the mean is below DOMINANT times the spread,
    DOMINANT^2 times that.

    Memory: d_in^2 numbers for each of second_moment and cross_moment that is needed.
    """

    def __init__(
        self,
        d_in: int,
        needs: frozenset[str] | set[str] = frozenset({"second_moment"}),
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float64,
        reference: InputMoments | None = None,
    ) -> None:
        unknown = set(needs) - INPUT_STATISTICS
        if unknown:
            raise ValueError(f"not statistics of an input: {sorted(unknown)}; known: {sorted(INPUT_STATISTICS)}")
        self.count = 0
        self.reference = reference
        shapes: dict[str, tuple[int, ...]] = {"mean": (d_in,), "abs_mean": (d_in,)}
        self._mirrored = True
        if "second_moment" in needs or "cross_moment" in needs:
            shapes["covariance"] = (d_in, d_in)
        if "cross_moment" in needs:
            shapes |= {"cross_covariance": (d_in, d_in)}
            if reference is None:
                shapes |= {"reference_mean": (d_in,), "reference_covariance": (d_in, d_in)}
        # Sums of x and of |x|, and of products of x - shift.
        self._sums: dict[str, Tensor] = {
            name: torch.zeros(shape, dtype=dtype if len(shape) == 2 else torch.float64, device=device)
            for name, shape in shapes.items()
        }
        # By the name of the stream's mean, once they are chosen; None for zero. Moments that were read have none: their
        # square sums are about the mean.
        self._shifts: dict[str, Tensor | None] = {}
        self._is_read = False

    def __repr__(self) -> str:
        return f"InputMoments({self.d_in} channels, {', '.join(self._sums)}; {self.count:,} tokens)"

    @property
    def d_in(self) -> int:
        return self._sums["mean"].shape[0]

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._sums["mean"].device

    @property
    def total(self) -> float:
        """What all rows weigh together: their number, or the sum of their weights."""
        return float(self._sums["weight"]) if "weight" in self._sums else float(self.count)

    @property
    def use(self) -> float:
        """What these rows weigh for each token that was offered; one where none were."""
        return self.total / float(self._sums["offered"]) if "offered" in self._sums else 1.0

    @property
    def share(self) -> float:
        """How many rows there are for each token that was offered; one where none were."""
        return self.count / float(self._sums["offered"]) if "offered" in self._sums else 1.0

    @property
    def are_zero(self) -> bool:
        """Whether the input was zero on every token."""
        return self.total > 0 and not bool(self._sums["abs_mean"].any())

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums by name, whole: of x and |x|, and of products of deviations from the mean.

        Cost: a copy of each square sum where the stream's sums are not about the mean, as those of `compact` are.
        """
        return {name: self._about(name) if name in SQUARES else total for name, total in self._sums.items()}

    def update(
        self,
        x: Float[Tensor, "*batch in"],
        mask: Bool[Tensor, "*batch"] | None = None,
        *,
        reference: Float[Tensor, "*batch in"] | None = None,
        weights: Float[Tensor, "*batch"] | None = None,
        offered: int = 0,
    ) -> None:
        """Add a batch, in place. Rows where `mask` is False (padding) are left out.

        Args:
            x: (..., d_in); any float type, products are taken in float32 (float64 for float64 input).
            mask: (...), True for real tokens.
            reference: (..., d_in), the same input in the dense model; required when cross_moment is kept.
            weights: (...), not negative, in every batch or in none.
            offered: tokens that there were, where these rows are not one of each: of them those given to an expert, or
                the tokens of another text; in every batch or in none.

        Raises:
            ValueError: shapes disagree, an entry is not finite, a reference is missing or needs cross_moment.

        Cost: n d_in (d_in + 512) operations for each symmetric statistic, 2 n d_in^2 for the cross moment.
        """
        if x.shape[-1] != self.d_in:
            raise ValueError(f"input has width {x.shape[-1]}, expected {self.d_in}")
        if (reference is not None) != ("cross_covariance" in self._sums):
            raise ValueError("a reference stream is for the statistic cross_moment, and only for it")
        if reference is not None and reference.shape != x.shape:
            raise ValueError(f"reference {tuple(reference.shape)} does not fit input {tuple(x.shape)}")
        roots = None if weights is None else self._weigh(rows_of(weights[..., None], mask))
        if offered or weights is not None:
            self._count("offered", torch.tensor(float(offered)))
        streams = {"mean": rows_of(x, mask)}
        if reference is not None:
            streams["reference_mean"] = rows_of(reference, mask)
        if len(streams["mean"]) and "covariance" in self._sums:
            self._choose_shifts(streams)
        for start in range(0, len(streams["mean"]), CHUNK_ROWS):
            parts = {name: rows[start : start + CHUNK_ROWS] for name, rows in streams.items()}
            part_roots = None if roots is None else roots[start : start + CHUNK_ROWS]
            size = SIZED_ROWS if x.device.type == "cpu" else CHUNK_ROWS
            for at, some in enumerate(parts["mean"].split(size)):
                sizes = widened(some).abs()
                if part_roots is not None:
                    sizes = sizes * part_roots[at * size : at * size + size].square().to(sizes)
                self._on(x.device, "abs_mean").add_(sizes.sum(0))
            deviations = {name: Deviations.of(part, self._shifts.get(name)) for name, part in parts.items()}
            for name, stream in deviations.items():
                self._add_rows(name, stream.wide, part_roots)
            if part_roots is not None:
                deviations = {name: stream.times(part_roots) for name, stream in deviations.items()}
            if "covariance" in self._sums:
                for factors, exact in exact_parts(list(deviations.values())):
                    with exact_products(x) if exact else full_float32():
                        self._add_squares(*factors)
        self.count += len(streams["mean"])
        # Looked at once per batch: a NaN or an infinity anywhere in the rows survives the sums.
        for name in ("abs_mean", "reference_mean"):
            if name in self._sums and not torch.isfinite(self._sums[name]).all():
                raise ValueError("an input is not finite; the model is broken or overflows in its stored type")

    def _choose_shifts(self, streams: dict[str, Tensor]) -> None:
        """The shift of each stream, by its first rows and for good. Moments that were read go on near their mean."""
        if self._is_read:
            shifts: dict[str, Tensor | None] = {name: self._stream_mean(name).float().double() for name in streams}
            moved = {name: self._about(name, shifts) for name in SQUARES if name in self._sums}
            self._sums = {name: total.clone() for name, total in self._sums.items()} | moved
            self._shifts, self._is_read = shifts, False
        for name, rows in streams.items():
            if name not in self._shifts:
                shift = shift_for(rows)
                self._shifts[name] = shift if bool(shift.any()) else None

    def _on(self, device: torch.device, name: str) -> Tensor:
        """A sum, moved to where the inputs are."""
        if self._sums[name].device != device:
            self._sums[name] = self._sums[name].to(device)
        return self._sums[name]

    def _weigh(self, weights: Float[Tensor, "n 1"]) -> Float[Tensor, "n 1"]:
        """Note what some rows weigh; returns the roots of their weights, in float64."""
        weights = weights.double()
        self._count("weight", weights.sum())
        return weights.sqrt()

    def _count(self, name: str, more: Tensor) -> None:
        """Add to a sum that is one number."""
        before = self._sums.get(name, torch.zeros((), dtype=torch.float64))
        self._sums[name] = before + more.to(before)

    def _add_rows(self, name: str, deviations: Tensor, roots: Tensor | None) -> None:
        """Add rows to the sum of a stream, unless its mean is known."""
        if name in self._sums:
            squares = None if roots is None else roots.square().to(deviations)
            rows = deviations if squares is None else deviations * squares
            total, shift = self._on(deviations.device, name).add_(rows.sum(0)), self._shifts.get(name)
            if shift is not None:
                total.add_(shift, alpha=len(deviations) if squares is None else float(squares.sum(dtype=torch.float64)))

    def _add_squares(self, own: Tensor, reference: Tensor | None = None) -> None:
        """Add products of rows to the square sums; of symmetric ones to the upper block triangle."""
        add_gram(self._on(own.device, "covariance"), own)
        self._mirrored = False
        if reference is not None:
            self._on(own.device, "cross_covariance").add_(inner_product(reference, own))
            if "reference_covariance" in self._sums:
                add_gram(self._on(own.device, "reference_covariance"), reference)

    def _whole(self, name: str) -> Tensor:
        """A sum about the shift, mirrored."""
        if not self._mirrored:
            for symmetric in SYMMETRIC:
                if symmetric in self._sums:
                    mirror(self._sums[symmetric])
            self._mirrored = True
        return self._sums[name]

    def _stream_mean(self, name: str) -> Tensor:
        """The mean of a stream, zero where no token was seen."""
        if name not in self._sums and self.reference is not None:
            return self.reference.mean
        return self._sums[name].double() / (self.total or 1)

    def _offsets(self, name: str, shifts: Mapping[str, Tensor | None] | None = None) -> tuple[Tensor, Tensor] | None:
        """By what the means are off the shifts of a square sum's rows and columns; None where that changes nothing.

        Args:
            shifts: default those that the sum is about.
        """
        if shifts is None and self._is_read:
            return None
        shifts = self._shifts if shifts is None else shifts
        pair = []
        for stream in SQUARES[name]:
            mean, shift = self._stream_mean(stream), shifts.get(stream)
            pair.append(mean if shift is None else mean - shift.to(mean.device))
        return (pair[0], pair[1]) if bool(pair[0].any()) and bool(pair[1].any()) else None

    def _about(
        self, name: str, shifts: Mapping[str, Tensor | None] | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A square sum, moved to other shifts, or to the mean; the sum itself where nothing is to be changed.

        Of n tokens with the mean mu, sum (x - t)(x - t)^T = sum (x - s)(x - s)^T - n (mu - s)(mu - s)^T
        + n (mu - t)(mu - t)^T.
        """
        total = self._whole(name)
        before, after = self._offsets(name), None if shifts is None else self._offsets(name, shifts)
        if before is None and after is None:
            return total if dtype is None else total.to(dtype)
        moved = torch.empty_like(total, dtype=dtype or total.dtype)
        for start in range(0, self.d_in, NORMALISED_ROWS):
            place = slice(start, start + NORMALISED_ROWS)
            rows = total[place].to(torch.float64, copy=True)
            for offsets, sign in ((before, -1), (after, 1)):
                if offsets is not None:
                    rows.addr_(offsets[0][place], offsets[1], alpha=sign * self.total)
            moved[place] = rows
        return moved

    def __add__(self, other: InputMoments) -> InputMoments:
        """The moments of both streams together: Chan's update, in which nothing cancels."""
        if self.d_in != other.d_in or self._sums.keys() != other._sums.keys():
            raise ValueError("only moments of the same width and the same statistics can be merged")
        first, second = self._state(torch.float64), other._state(torch.float64)
        merged = {name: first[name] + second[name] for name in first}
        count, total = self.count + other.count, self.total + other.total
        apart = {name: other._stream_mean(name) - self._stream_mean(name) for name in STREAMS if name in first}
        for name, (rows, columns) in SQUARES.items():
            if name in merged:
                merged[name].addr_(apart[rows], apart[columns], alpha=self.total * other.total / (total or 1))
        return InputMoments.from_state(count, merged)

    @classmethod
    def from_state(cls, count: int, sums: Mapping[str, Tensor]) -> InputMoments:
        """The moments with this `count` and these `sums`, as read from a file."""
        moments = cls(sums["mean"].shape[0], frozenset())
        moments.count, moments._sums, moments._is_read = count, dict(sums), True
        return moments

    @property
    def running(self) -> dict[str, Tensor]:
        """What more rows are added to, as it is: the sums about the shifts, and the shifts; see `go_on_from`."""
        zero = torch.zeros(0, dtype=torch.float64)
        shifts = {f"{SHIFT}{name}": zero if shift is None else shift for name, shift in self._shifts.items()}
        return self._sums | shifts

    def go_on_from(self, count: int, running: Mapping[str, Tensor]) -> None:
        """Be the moments whose `count` and `running` these are, in place: what is added gives the same to the bit."""
        self.count, self._sums, self._shifts = count, {}, {}
        for name, value in running.items():
            if name.startswith(SHIFT):
                self._shifts[name.removeprefix(SHIFT)] = value if len(value) else None
            else:
                self._sums[name] = value
        # Those that were read have no shifts; nor have those that no row was added to, which are to choose theirs yet.
        self._mirrored, self._is_read = False, count > 0 and not self._shifts

    def scale(self, factor: float) -> None:
        """Have every row weigh so many times as much, in place, of rows that have weights."""
        if "weight" not in self._sums:
            raise ValueError("these rows have no weights, so that they cannot weigh more")
        self._sums = {name: total if name == "offered" else total * factor for name, total in self._sums.items()}

    def shrunk(self, mean: InputMoments, rows: float) -> InputMoments:
        """These moments with so many more rows, of ordinary weight, that are distributed as `mean` is.

        No text has those rows: the `share` stays, as if more tokens had been offered as well; of no row it is that of
        half a one, so that what is never used weighs little and not nothing.

        Args:
            mean: of rows with weights, as these are.
        """
        factor = rows / mean.count
        sums = {name: total * factor for name, total in mean._state(torch.float64).items()}
        count = self.count + round(rows)
        offered = self._sums["offered"] * (count / max(self.count, UNUSED) - 1)
        more = InputMoments.from_state(0, sums | {"offered": offered.to(sums["offered"])})
        merged = self + more
        merged.count = count
        return merged.compact()

    def doubled(self) -> InputMoments:
        """The moments of two streams that are one: this one, and its reference the same."""
        sums = self._state(torch.float32)
        sums |= {"reference_mean": sums["mean"]}
        sums |= dict.fromkeys(("cross_covariance", "reference_covariance"), sums["covariance"])
        return InputMoments.from_state(self.count, sums)

    def compact(self) -> InputMoments:
        """These moments, their square sums now about the mean and in float32: half the memory and disk, 6e-8 relative.

        Each sum is let go as soon as it is rounded, so that there is never more than one in both types.

        Raises:
            ValueError: the reference stream's moments that were given are of another number of tokens.
        """
        known = self._known()
        for name in SQUARES:
            if name in self._sums:
                self._sums[name] = self._about(name, dtype=torch.float32)
        self._sums |= {name: total.float() if name in SQUARES else total for name, total in known.items()}
        self._shifts, self._is_read, self.reference = {}, True, None
        return self

    def _state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The sums, those of products about the mean and in a type, with what is known of the reference stream."""
        return {
            name: self._about(name, dtype=dtype) if name in SQUARES else total.clone()
            for name, total in self._sums.items()
        } | {name: total.to(dtype) if name in SQUARES else total for name, total in self._known().items()}

    def _known(self) -> dict[str, Tensor]:
        """The sums of the reference stream that were given."""
        if self.reference is None:
            return {}
        if self.reference.count != self.count:
            raise ValueError(f"{self.count} tokens were seen, and the reference's are of {self.reference.count}")
        known = self.reference.sums
        return {"reference_mean": known["mean"], "reference_covariance": known["covariance"]}

    def keeps(self, name: str) -> torch.dtype | None:
        """The type in which a sum is kept, or None where it is not."""
        return self._sums[name].dtype if name in self._sums else None

    def _require(self, name: str, statistic: str) -> None:
        """Raises ValueError where the sum that a statistic is made of is not kept, or no token was seen."""
        if name not in self._sums:
            raise ValueError(f"{statistic} was not collected; calibrate with a method that needs it")
        if not self.total:
            raise ValueError("no token was seen: the calibration text is empty or masked out")

    def _mean_of(self, name: str) -> Tensor:
        self._require(name, name)
        return self._sums[name].double() / self.total

    def moment(self, *, centred: bool = False, dtype: torch.dtype = torch.float64) -> Float[Tensor, "in in"]:
        """G, or C where centred: computed in float64, returned in `dtype`, without a copy in between."""
        self._require("covariance", "second_moment")
        matrix = torch.empty(self.d_in, self.d_in, dtype=dtype, device=self._sums["covariance"].device)
        for place, rows in self._moment_rows(centred):
            matrix[place] = rows
        return matrix

    def apply_moment(self, vectors: Float[Tensor, "in n"], *, centred: bool = False) -> Float[Tensor, "in n"]:
        """G or C times some vectors, in float64, without the matrix in float64."""
        return torch.cat([rows @ vectors.double() for _, rows in self._moment_rows(centred)])

    def variances(self, *, centred: bool = False) -> Float[Tensor, "in"]:
        """The diagonal of G or C."""
        self._require("covariance", "second_moment")
        squares = self._sums["covariance"].diagonal().double() / self.total
        offsets = self._offsets("covariance")
        if offsets is not None:
            squares = squares - offsets[0].square()
        return squares if centred else squares + self.mean.square()

    def energy(self, weight: Float[Tensor, "out in"], *, reference: bool = False) -> float:
        """E||W x||^2, of the reference stream where that is asked for. Cost: as `spread`."""
        mean = self.reference_mean if reference else self.mean
        return self.spread(weight, reference=reference) + float((weight.double() @ mean).square().sum())

    def spread(self, weight: Float[Tensor, "out in"], *, reference: bool = False) -> float:
        """E||W (x - mu)||^2. Cost: d_out d_in (d_in + 256) operations."""
        name = "reference_covariance" if reference else "covariance"
        self._require(name, "reference_second_moment" if reference else "second_moment")
        return symmetric_trace(weight, self._about(name)) / self.total

    def _moment_rows(self, centred: bool) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of G or C at a time, in float64, and which."""
        self._require("covariance", "second_moment")
        total, offsets = self._whole("covariance"), self._offsets("covariance")
        mean = None if centred else self.mean
        for start in range(0, self.d_in, NORMALISED_ROWS):
            place = slice(start, start + NORMALISED_ROWS)
            rows = total[place].to(torch.float64, copy=True).div_(self.total)
            if offsets is not None:
                rows.addr_(offsets[0][place], offsets[1], alpha=-1)
            if mean is not None:
                rows.addr_(mean[place], mean)
            yield place, rows

    def _covariance_of(self, name: str, statistic: str) -> Tensor:
        self._require(name, statistic)
        return self._about(name, dtype=torch.float64) / self.total

    @property
    def mean(self) -> Float[Tensor, "in"]:
        return self._mean_of("mean")

    @property
    def abs_mean(self) -> Float[Tensor, "in"]:
        return self._mean_of("abs_mean")

    @property
    def second_moment(self) -> Float[Tensor, "in in"]:
        """G = E[x x^T], uncentred."""
        return self.moment()

    @property
    def covariance(self) -> Float[Tensor, "in in"]:
        """C = E[(x - mu)(x - mu)^T]."""
        return self.moment(centred=True)

    @property
    def cross_moment(self) -> Float[Tensor, "in in"]:
        """X = E[x xh^T], dense input by compressed input."""
        return self.cross_covariance + torch.outer(self.reference_mean, self.mean)

    @property
    def cross_covariance(self) -> Float[Tensor, "in in"]:
        return self._covariance_of("cross_covariance", "cross_moment")

    @property
    def reference_mean(self) -> Float[Tensor, "in"]:
        """E[x] of the dense model's input; the mean itself where no reference was streamed."""
        if "cross_covariance" in self._sums:
            self._require("mean", "mean")
            return self._stream_mean("reference_mean")
        return self.mean

    @property
    def reference_second_moment(self) -> Float[Tensor, "in in"]:
        spread = self._covariance_of("reference_covariance", "reference_second_moment")
        return spread + torch.outer(self.reference_mean, self.reference_mean)
