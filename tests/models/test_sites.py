"""Sites: selecting among them by pattern, role, part and block range."""

from __future__ import annotations

import pytest

from eckart.models.sites import Site, block_names, blocks_of, common_blocks, find_sites, parse_blocks, select_sites
from eckart.support.sizes import num_bytes, num_params
from tiny import DEFAULT_CONFIGS, FAMILY_CONFIGS, tiny_model

ROLES = {
    "self_attn.q_proj": "attention",
    "self_attn.k_proj": "attention",
    "self_attn.o_proj": "attention",
    "mlp.up_proj": "mlp",
    "mlp.down_proj": "mlp",
}


def made_sites(blocks: int) -> tuple[Site, ...]:
    return tuple(
        Site(f"model.layers.{block}.{role}", role, part, block, f"model.layers.{block}.{role}", 8, 8, False)
        for block in range(blocks)
        for role, part in ROLES.items()
    )


SITES = made_sites(20)


def names(**how: object) -> set[str]:
    return {site.name for site in select_sites(SITES, **how)}  # type: ignore[arg-type]


def test_nothing_asked_selects_all_in_order() -> None:
    assert select_sites(SITES) == SITES


@pytest.mark.parametrize(
    ("include", "roles"),
    [
        (["mlp"], {"mlp.up_proj", "mlp.down_proj"}),
        (["attention"], {"self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"}),
        (["q_proj"], {"self_attn.q_proj"}),
        (["mlp.down_proj"], {"mlp.down_proj"}),
        (["q_proj", "mlp"], {"self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"}),
        (["model.layers.*.mlp.*"], {"mlp.up_proj", "mlp.down_proj"}),
        (["*.[qk]_proj"], {"self_attn.q_proj", "self_attn.k_proj"}),
        (["*"], set(ROLES)),
    ],
)
def test_include_by_part_role_and_pattern(include: list[str], roles: set[str]) -> None:
    assert names(include=include) == {site.name for site in SITES if site.role in roles}


def test_exclude_wins_over_include() -> None:
    assert names(include=["mlp"], exclude=["up_proj"]) == {s.name for s in SITES if s.role == "mlp.down_proj"}
    assert names(exclude=["mlp", "o_proj"]) == {s.name for s in SITES if s.role.endswith(("q_proj", "k_proj"))}


def test_patterns_and_blocks_together() -> None:
    assert names(include=["down_proj"], blocks="last 2") == {
        "model.layers.18.mlp.down_proj",
        "model.layers.19.mlp.down_proj",
    }


def test_one_name_selects_one_site() -> None:
    # "model.layers.1.mlp.up_proj" must not reach into block 11.
    assert names(include=["model.layers.1.mlp.up_proj"]) == {"model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("last 12", range(8, 20)),
        ("first 4", range(4)),
        ("last 3/8", range(12, 20)),  # 7.5 blocks, rounded to the even 8
        ("first 1/4", range(5)),
        ("first 1/100", [0]),
        ("last 1/1", range(20)),
        ("First 4", range(4)),
        ("last 20", range(20)),
        ("8-19", range(8, 20)),
        ("7", [7]),
        ("0,5,7", [0, 5, 7]),
        ("0, 5-7 ,19", [0, 5, 6, 7, 19]),
    ],
)
def test_block_ranges(text: str, blocks: range | list[int]) -> None:
    assert parse_blocks(text, 20) == frozenset(blocks)
    assert {site.block for site in select_sites(SITES, blocks=text)} == set(blocks)


@pytest.mark.parametrize("text", ["", "all", "last", "last -1", "3:5", "1-", "1,,2", "1.5", "last 3, 4", "-1"])
def test_a_malformed_block_range_says_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="is none of 'last 12', 'first 1/4', '8-19', '0,5,7'"):
        parse_blocks(text, 20)


@pytest.mark.parametrize("text", ["last 9/8", "first 0/4"])
def test_a_share_of_the_blocks_is_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a share in \(0, 1\]"):
        parse_blocks(text, 20)


@pytest.mark.parametrize("text", ["last 21", "first 0", "20", "0-20", "3,25"])
def test_blocks_outside_the_model_give_its_number(text: str) -> None:
    with pytest.raises(ValueError, match=r"this model has (20 blocks|blocks 0 \.\.\. 19)"):
        parse_blocks(text, 20)


@pytest.mark.parametrize("text", ["7-3", "0,7-3"])
def test_a_backward_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="7-3"):
        parse_blocks(text, 20)


@pytest.mark.parametrize("how", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_lists_what_there_is(how: str) -> None:
    with pytest.raises(ValueError, match=r"'gate_porj' matches no site; roles: .*mlp\.up_proj.*parts: attention, mlp"):
        names(**{how: ["gate_porj"]})


def test_a_selection_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no site matches all of it"):
        names(include=["mlp"], exclude=["*"])
    with pytest.raises(ValueError, match="no site matches all of it"):
        names(include=["model.layers.3.*"], blocks="last 2")


def test_break_even_rank_stores_no_more_than_dense() -> None:
    for site in find_sites(tiny_model("llama")):
        rank = site.break_even_rank
        assert rank * (site.d_in + site.d_out) <= site.num_params < (rank + 1) * (site.d_in + site.d_out)


def test_sizes_count_tied_tensors_once() -> None:
    tied, untied = (tiny_model("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert num_params(untied) - num_params(tied) == tied.lm_head.weight.numel()
    assert num_bytes(tied) == 4 * num_params(tied)
    assert num_bytes(tied.bfloat16()) == 2 * num_params(tied)


@pytest.mark.parametrize("model_type", [*FAMILY_CONFIGS, *DEFAULT_CONFIGS])
def test_blocks_have_names_in_order(model_type: str) -> None:
    model = tiny_model(model_type)
    assert [model.get_submodule(name) for name in block_names(model)] == list(blocks_of(model))


def test_models_of_other_depths_have_no_blocks_in_common() -> None:
    model, shallow = tiny_model("llama"), tiny_model("llama", num_hidden_layers=2)
    assert common_blocks(model, tiny_model("llama")) == block_names(model)
    for pair in ((model, shallow), (shallow, model)):
        with pytest.raises(ValueError, match="is it the dense model that this one came from"):
            common_blocks(*pair)
