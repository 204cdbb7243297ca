"""Our models in lmms-eval: ``lmms-eval --model mmagent --model_args checkpoint=DIR`` (or ``url=URL,model=NAME``).

The entry point of setup.py makes lmms-eval find it; this module alone wants the package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from evals.bridges.answers import Answerer, Asked
from evals.bridges.lmms_task import asked


class MmagentModel(lmms):
    """A checkpoint or an endpoint, asked as `evals` asks it."""

    is_simple = False

    def __init__(
        self,
        checkpoint: str = "",
        url: str = "",
        model: str = "",
        device: str = "",
        batch_size: int | str = 1,
        **_: Any,
    ):
        """``batch_size`` and what else the harness hands to every model has no meaning here: what is asked together is
        decoded together. Raises ``ValueError`` naming what is missing."""
        super().__init__()
        self.answerer = Answerer.of(str(checkpoint), str(url), str(model), str(device) if checkpoint else "")

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        return self.answerer.answers([self._asked(*request.args) for request in requests])

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("mmagent answers in words; choose tasks whose output_type is generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("mmagent takes one turn here; for several, run `python -m evals`")

    def _asked(
        self, context: str, to_messages: Any, told: Mapping[str, Any], doc_id: int, task: str, split: str
    ) -> Asked:
        return asked(to_messages(self.task_dict[task][split][doc_id]), told, f"{task} {doc_id}")
