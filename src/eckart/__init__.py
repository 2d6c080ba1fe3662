"""eckart: low-rank compression of Hugging Face language models.

    recipe = eckart.parse_recipe({"model": "DIR", "keep": 0.7})            # method best: everything that helps
    eckart.make_checkpoint(recipe, Path("out"), eckart.How())

    plan = eckart.plan(model, keep=0.7)                                    # or one method, step by step
    stats = eckart.calibrate(model, tokens, eckart.build_method("nsvd-i"))
    eckart.compress(model, "nsvd-i", plan, stats)                          # in place
    eckart.save(model, "out/", tokenizer)

Importing it also teaches stock `from_pretrained` to read compressed checkpoints. It touches no GPU and no network.
"""

from eckart.support.quiet import quiet

# Where torchao is installed, transformers imports it with its models, and it warns of kernels for other machines.
with quiet("torchao", "torch.utils._pytree"):
    import transformers.modeling_utils  # noqa: F401

from eckart.allocation import Budget, RankPlan, Rule, plan
from eckart.allocation.search.loss_weights import probe_linears
from eckart.allocation.search.surgical import SearchResult, Tolerance, search
from eckart.calibration.moments import Calibration, calibrate, calibrate_by_block
from eckart.calibration.sequential import SequentialCalibration
from eckart.compression.replace import CompressionReport, compress
from eckart.compression.tuning.finetuning import FineTuning, fine_tune
from eckart.compression.tuning.refinement import Refinement
from eckart.data.corpora import read_text
from eckart.data.labelled import Labelled, read_labelled
from eckart.data.tokens import Tokens, sample_documents, sample_windows
from eckart.evals.probing import probe
from eckart.evals.result import EvalResult
from eckart.evals.tasks import Task, evaluate
from eckart.lowrank import METHODS, Method, build_method
from eckart.models.checkpoint import CheckpointError
from eckart.models.dense import export_dense
from eckart.models.families import UnsupportedModelError
from eckart.models.linear import LowRankLinear
from eckart.models.loading import load_model, load_tokenizer, save
from eckart.runs.composition import COMPOSITIONS, Composition
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core
from eckart.runs.recipe import Recipe, load_recipe, parse_recipe

__all__ = [
    "COMPOSITIONS",
    "METHODS",
    "Budget",
    "Calibration",
    "CheckpointError",
    "Composition",
    "CompressionReport",
    "EvalResult",
    "FineTuning",
    "How",
    "Labelled",
    "LowRankLinear",
    "Method",
    "RankPlan",
    "Recipe",
    "Refinement",
    "Rule",
    "SearchResult",
    "SequentialCalibration",
    "Task",
    "Tokens",
    "Tolerance",
    "UnsupportedModelError",
    "build_method",
    "calibrate",
    "calibrate_by_block",
    "compress",
    "compress_out_of_core",
    "evaluate",
    "export_dense",
    "fine_tune",
    "load_model",
    "load_recipe",
    "load_tokenizer",
    "make_checkpoint",
    "parse_recipe",
    "plan",
    "probe",
    "probe_linears",
    "read_labelled",
    "read_text",
    "sample_documents",
    "sample_windows",
    "save",
    "search",
]
