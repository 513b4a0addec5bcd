"""The child as MLflow serves it: this file is copied into the logged model, and runs where there is no puzzle.

mlflow models serve -m models:/puzzle-tiny@champion --env-manager local
curl localhost:5000/invocations -H 'content-type: application/json' -d '{"inputs": [{"prompt": "Once"}]}'
"""

from typing import Any

import pydantic
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class Completion(pydantic.BaseModel):
    """What is asked for. temperature 0: the most likely token each time."""

    prompt: str
    max_new_tokens: int = pydantic.Field(default=64, ge=1, le=4096)
    temperature: float = pydantic.Field(default=0.0, ge=0)
    seed: int = 0


class Child(PythonModel):
    """A child's folder, loaded by transformers with the modeling code that lies in it."""

    def load_context(self, context: Any) -> None:
        """Load tokenizer and weights once."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = context.artifacts["checkpoint"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()

    def predict(self, model_input: list[Completion]) -> list[str]:  # type: ignore[override]
        """The continuation of every prompt, without the prompt."""
        return [self._complete(asked) for asked in model_input]

    def _complete(self, asked: Completion) -> str:
        import torch

        encoded = self.tokenizer(asked.prompt, return_tensors="pt", return_token_type_ids=False)
        sampled = {"do_sample": True, "temperature": asked.temperature} if asked.temperature else {"do_sample": False}
        torch.manual_seed(asked.seed)
        with torch.inference_mode():
            tokens = self.model.generate(**encoded, max_new_tokens=asked.max_new_tokens, **sampled)
        return str(self.tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


set_model(Child())
