"""Process reward models for Transformers: one logit per reasoning step.

Importing this package registers its classes with the Auto classes, so that `AutoModel.from_pretrained`
loads a PRM without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_prm import PRMConfig
from .modeling_prm import PRMForStepScoring, StepScoringOutput
from .processing_prm import PRMProcessor
from .scoring import PRMVerifier
from .sessions import open_session
from .solution_score import SolutionScore

AutoConfig.register(PRMConfig.model_type, PRMConfig)
AutoModel.register(PRMConfig, PRMForStepScoring)
AutoProcessor.register(PRMConfig, PRMProcessor)
# What is registered for an auto class takes its code along when it is saved.
PRMConfig.register_for_auto_class()
PRMForStepScoring.register_for_auto_class("AutoModel")
PRMProcessor.register_for_auto_class()
# Sessions do not go out with checkpoints, whose verifiers have them where this package is installed.
PRMVerifier.session = open_session  # type: ignore[attr-defined]

__all__ = [
    "PRMConfig",
    "PRMForStepScoring",
    "PRMProcessor",
    "PRMVerifier",
    "SolutionScore",
    "StepScoringOutput",
]
