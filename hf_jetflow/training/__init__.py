"""Training a head: prompts, the target's own answers, losses, the trainer, the recipe of `hf-jetflow train`.

Start with `settings.py` and `recipe.py` (the whole run), then `trainer.py` (a transformers `Trainer`) and `blocks.py`
(one update).
`replay.py` and `evaluation.py` measure tokens per round on stored texts.
"""
