"""Latent attention: layers of ordinary models that cache latents of keys and values, and the cache that holds them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from eckart.models.linear import LowRankLinear

if TYPE_CHECKING:
    from eckart.models.heads import HeadGroups

# Cosines and sines of the rotations of tokens: (batch or 1, tokens, head_dim) of each, as a model gives them.
Rotations = tuple[Tensor, Tensor]
# Kernels that take values of another width than keys.
ANY_WIDTH = ("eager", "sdpa")


class LatentCache(DynamicCache):
    """A cache that holds r numbers a token of each group of key heads and of value heads, in place of all.

    For a model whose heads are open, see `heads.open_heads`; `generate` takes it as `past_key_values`. Each layer of it
    is one of transformers' own, full or sliding, with latents (batch, 1, tokens, r) as its keys and its values, so that
    beams and cropping are theirs.

    Keys are rotated by the position of their token when they are read. The rotations of the cached tokens are with the
    latents of the last layer of each kind (full, sliding), head_dim numbers a token: as they were given, so that any
    padding and any kind of rotary positions is right, and before that layer's update they are those of the tokens that
    the earlier layers have from before.

    Args:
        config: of the model.
    """

    layers: list[DynamicLayer]  # type: ignore[assignment]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or [""] * len(self.layers)
        last = {kind: number for number, kind in enumerate(kinds)}
        # For each layer the one that holds its rotations.
        self.holders = [last[kind] for kind in kinds]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError: whoever calls it has keys and values, and no latents."""
        raise ValueError(
            f"layer {layer_idx} has no latents of keys and values to cache: give a model made with --keep-cache, or "
            "open its heads first, eckart.open_heads(model)"
        )

    def update_latents(
        self, keys: Tensor, values: Tensor, rotations: Tensor, layer: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cache the latents of new tokens; gives those of all that a layer reads, and their rotations.

        Args:
            keys, values: (batch, tokens, r) of the new tokens. rotations: theirs, see `pack`.

        Raises:
            ValueError: the layer that holds the rotations was not run on the tokens that this one was.
        """
        holder, width = self.holders[layer], keys.shape[-1]
        own = rotations.expand(len(keys), -1, -1)
        if holder == layer:
            keys = torch.cat((keys, own), -1)
        else:
            past = self.layers[holder].keys
            own = own if past is None or past.numel() == 0 else torch.cat((past[:, 0, :, -own.shape[-1] :], own), -2)
        k, v = super().update(keys[:, None], values[:, None], layer)
        k, v = k[:, 0], v[:, 0]
        if holder == layer:
            k, own = k[..., :width], k[..., width:]
        if own.shape[-2] < k.shape[-2]:
            raise ValueError(
                f"layer {layer} has cached {k.shape[-2]} tokens, and layer {holder}, which holds their positions, "
                f"{own.shape[-2]}: a cache is for all layers of a model"
            )
        return k, v, own[:, -k.shape[-2] :]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that it holds."""
        held = [tensor for layer in self.layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.nbytes for tensor in held)


def pack(rotations: Rotations) -> Tensor:
    """(batch or 1, tokens, head_dim): half of the cosines and half of the sines; the other halves are the same."""
    return torch.cat([each[..., : each.shape[-1] // 2] for each in rotations], -1)


def rotate(x: Tensor, packed: Tensor) -> Tensor:
    """Heads (batch, heads, tokens, head_dim) rotated by the positions of their tokens (Su et al. 2021, RoFormer).

    Number i of a head is a pair with number i + head_dim / 2, as the models here have it.
    """
    cos, sin = packed.unsqueeze(1).chunk(2, -1)
    a, b = x.chunk(2, -1)
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), -1)


class LatentAttention(nn.Module):
    """What `as_latent` gives an attention module to do with a `LatentCache`; with any other cache it does as before.

    Keys are rebuilt from their latents, normed where the model norms them, and rotated. Values are rebuilt where many
    tokens ask. Where few do, as in generation, the attention sums latents and L is applied to the sums: o_h = L_g u_h
    with u_h = sum_t p_ht z_t, for each head h that asks of the group g. That is what L folded into `o_proj` computes,
    and is exact: probabilities sum to one, so that a bias may be added after as well.
    """

    if TYPE_CHECKING:
        config: PreTrainedConfig
        layer_idx: int
        head_dim: int
        scaling: float
        attention_dropout: float
        k_proj: HeadGroups
        v_proj: HeadGroups

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Rotations,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(past_key_values, LatentCache):
            given: dict[str, Any] = {"attention_mask": attention_mask, "past_key_values": past_key_values, **kwargs}
            return super().forward(hidden_states, position_embeddings, **given)
        shape = hidden_states.shape[:-1]
        queries = self._heads(self.q_proj(hidden_states), "q_norm")  # type: ignore[operator]
        new = pack(position_embeddings).to(queries.dtype)
        queries = rotate(queries, new)
        k, v, rotations = past_key_values.update_latents(
            self.k_proj.latents(hidden_states), self.v_proj.latents(hidden_states), new, self.layer_idx
        )
        keys = rotate(self._heads(self.k_proj.rebuild(k), "k_norm"), rotations)

        attend, settings = _kernel(self), {**_settings(self), **kwargs}

        def run(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
            """(batch, new tokens, heads, width of the values), and the probabilities where the kernel gives them."""
            result: tuple[Tensor, Tensor | None] = attend(self, queries, keys, values, attention_mask, **settings)
            return result

        if self._sums_latents(queries):
            output, weights = self._run_on_latents(run, queries, keys, v)
        else:
            output, weights = run(queries, keys, self._heads(self.v_proj.rebuild(v)))
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights  # type: ignore[operator]

    def _heads(self, x: Tensor, norm: str = "") -> Tensor:
        """(batch, heads, tokens, head_dim) of (batch, tokens, heads x head_dim), normed where there is such a norm."""
        x = x.unflatten(-1, (-1, self.head_dim))
        module = self._modules.get(norm)
        return (x if module is None else module(x)).transpose(1, 2)

    def _sums_latents(self, queries: Tensor) -> bool:
        """Whether so few tokens ask that sums of latents take less than rebuilding the values of all cached tokens."""
        asks = queries.shape[-2] * queries.shape[1] // (self.k_proj.out_features // self.head_dim)
        return asks <= self.head_dim and _kernel_name(self) in ANY_WIDTH

    def _run_on_latents(
        self, run: Callable[..., tuple[Tensor, Tensor | None]], queries: Tensor, keys: Tensor, latents: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The attention group by group, on the values' latents."""
        groups, widths, d = self.v_proj.groups, self.v_proj.widths, self.head_dim
        heads = self.v_proj.size // d
        outputs, weights = [], []
        parts = zip(*(x.chunk(len(groups), 1) for x in (queries, keys)), latents.split(widths, -1), strict=True)
        for number, (q, k, z) in enumerate(parts):
            if not isinstance(groups[number], LowRankLinear):  # nothing is to be rebuilt
                output, weight = run(q, k, self._heads(z))
            else:
                u, weight = run(q, k, z[:, None].expand(-1, heads, -1, -1))
                # Each head that asks needs its own head's rows of L alone.
                every = self.v_proj.rebuild_group(number, u).unflatten(-1, (heads, d))
                own = torch.arange(heads, device=u.device).repeat_interleave(q.shape[1] // heads)
                output = every[:, :, torch.arange(q.shape[1], device=u.device), own]
            outputs.append(output)
            weights.append(weight)
        whole = None if weights[0] is None else torch.cat(cast(list[Tensor], weights), 1)
        return torch.cat(outputs, 2), whole


def _kernel_name(attention: Any) -> str:
    return str(attention.config._attn_implementation)  # noqa: SLF001 (where transformers' own attention reads it)


def _kernel(attention: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that the model runs; the eager one is that of its own file."""
    eager = vars(sys.modules[attention.stock.__module__])["eager_attention_forward"]
    kernel: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(_kernel_name(attention), eager)
    return kernel


def _settings(attention: Any) -> dict[str, Any]:
    """What the attention gives its kernel in addition to tensors, as its own `forward` does."""
    config = attention.config
    # Mistral's window is that of all layers; where layers differ, those that have one know it.
    window = None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)
    settings = {
        "dropout": attention.attention_dropout if attention.training else 0.0,
        "scaling": attention.scaling,
        "sliding_window": getattr(attention, "sliding_window", window),
    }
    softcap = getattr(attention, "attn_logit_softcapping", None)
    return settings if softcap is None else {**settings, "softcap": softcap}


@cache
def _latent_class(stock: type[nn.Module]) -> type[nn.Module]:
    """A class of attention that does what the stock one does, and takes a `LatentCache`."""
    return type(f"Latent{stock.__name__}", (LatentAttention, stock), {"__module__": __name__, "stock": stock})


def as_latent(attention: nn.Module) -> None:
    """Have an attention module whose heads are open take a `LatentCache`, in place: its class is another then."""
    attention.__class__ = _latent_class(cast(Any, type(attention)))


def as_stock(attention: nn.Module) -> None:
    """Undo `as_latent`, in place."""
    attention.__class__ = attention.stock  # type: ignore[assignment]
