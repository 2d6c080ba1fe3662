# The names of the face, each with the file that it comes from. `eckart/__init__.py` reads them here when it is imported
# and imports a file when one of its names is used; type checkers and editors read them here too.
# ruff: noqa: I001 (in the order of use, not of the alphabet)

# load
from .data.corpora import read_text as read_text
from .data.labelled import Labelled as Labelled, read_labelled as read_labelled
from .data.samples import read_tokens as read_tokens
from .data.samples import sample_documents as sample_documents, sample_windows as sample_windows
from .data.samples import sample_halves as sample_halves, sample_pairs as sample_pairs
from .data.tokens import Tokens as Tokens
from .models.checkpoint import CheckpointError as CheckpointError
from .models.experts import open_experts as open_experts
from .models.heads import open_heads as open_heads
from .models.latent_attention import LatentCache as LatentCache
from .models.families import UnsupportedModelError as UnsupportedModelError
from .models.loading import load_model as load_model, load_tokenizer as load_tokenizer
from .models.quantised import Quantised as Quantised, load_quantised as load_quantised

# plan
from .allocation import Budget as Budget, RankPlan as RankPlan, Rule as Rule, plan as plan
from .allocation.rank_plan import in_bits as in_bits
from .allocation.search.loss_weights import probe_linears as probe_linears
from .allocation.search.surgical import SearchResult as SearchResult, Tolerance as Tolerance, search as search

# calibrate
from .calibration.moments import Calibration as Calibration
from .calibration.moments import calibrate as calibrate, calibrate_by_block as calibrate_by_block
from .calibration.sequential import SequentialCalibration as SequentialCalibration

# compress
from .compression.correction import Correction as Correction, correct as correct
from .compression.replace import CompressionReport as CompressionReport, compress as compress
from .compression.tuning.finetuning import FineTuning as FineTuning, fine_tune as fine_tune
from .compression.tuning.refinement import Refinement as Refinement
from .lowrank import METHODS as METHODS, Method as Method, build_method as build_method
from .lowrank.storage import Storage as Storage
from .models.coded import CodedLinear as CodedLinear
from .models.linear import LowRankLinear as LowRankLinear
from .runs.composition import COMPOSITIONS as COMPOSITIONS, Composition as Composition
from .runs.out_of_core import compress_out_of_core as compress_out_of_core

# save
from .models.adapters import lora_targets as lora_targets, write_lora as write_lora
from .models.dense import export_dense as export_dense
from .models.loading import save as save

# evaluate
from .evals.probing import probe as probe
from .evals.result import EvalResult as EvalResult
from .evals.task import Task as Task
from .evals.tasks import evaluate as evaluate

# run
from .runs.experiment import run as run
from .runs.recipe import Recipe as Recipe, load_recipe as load_recipe, parse_recipe as parse_recipe
from .runs.how import How as How
from .runs.correction import CorrectionRecipe as CorrectionRecipe, make_correction as make_correction
from .runs.in_memory import make_checkpoint as make_checkpoint
