"""A `custom_generate` recipe for a Hub repository that holds a JetFlow head next to this folder.

    target.generate(**inputs, custom_generate="org/head", trust_remote_code=True)

The head is looked for in the repository named by `jetflow_head`, by default the one named in this file. It needs
`hf_jetflow`, which requirements.txt beside this file says.
"""

from functools import lru_cache
from typing import Any

from hf_jetflow import JetFlowHead


DEFAULT_HEAD = "org/head"  # set this to the id of your repository


@lru_cache(maxsize=4)
def _load(head: str, device: str, dtype: Any) -> JetFlowHead:
    return JetFlowHead.from_pretrained(head, dtype=dtype).to(device).eval()


def generate(model: Any, jetflow_head: str | JetFlowHead = DEFAULT_HEAD, **kwargs: Any) -> Any:
    """What `model.generate` would return, decoded with the head. `kwargs` are those of `generate`."""
    head = jetflow_head
    if isinstance(head, str):
        head = _load(head, str(model.device), model.dtype)
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    return model.generate(**kwargs, assistant_model=head)
