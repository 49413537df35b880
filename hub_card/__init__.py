"""Everything that leaves or enters the project as a checkpoint: model cards, publishing and conversion."""

from .card import CardData, EvaluationResult, Picture
from .code_files import CodeCheck, verify
from .publishing import Publication, publish

__all__ = ["CardData", "CodeCheck", "EvaluationResult", "Picture", "Publication", "publish", "verify"]
