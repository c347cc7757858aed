"""Named configurations, and the optimizer settings that suit each architecture."""

from typing import Any

from nanogpt.errors import UserError


def _gpt2(
    n_layer: int, n_head: int, n_embd: int, learning_rate: float, steps: int
) -> dict[str, Any]:
    """Return the configuration of a GPT-2 model.

    The shape is that of Radford et al. 2019, table 2; batch and context are those of section 2.3.
    They do not report rate and warm-up, which are those of the GPT-3 model of this size (Brown et
    al. 2020, table 2.1 and appendix B). The number of steps gives 20 tokens per parameter (Hoffmann
    et al. 2022, table 3).
    """
    return {
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
        "context_length": 1024,
        "dropout": 0.1,
        "batch_size": 512,
        "learning_rate": learning_rate,
        "warmup_steps": 700,
        "steps": steps,
    }


# The settings of each preset that differ from the defaults, which are preset `nano`.
PRESETS: dict[str, dict[str, Any]] = {
    "nano": {},
    "gpt2": _gpt2(12, 12, 768, 6e-4, 5_000),
    "gpt2-medium": _gpt2(24, 16, 1024, 3e-4, 13_500),
    "gpt2-large": _gpt2(36, 20, 1280, 2.5e-4, 29_500),
    "gpt2-xl": _gpt2(48, 25, 1600, 2e-4, 59_500),
}

# What the recipe chooses for long runs of `qwen3` models.
QWEN3_SETTINGS: dict[str, Any] = {
    "dropout": 0.0,
    "optimizer": "muon",
    "learning_rate": 3e-3,
    "muon_learning_rate": 0.015,
    "cooldown_fraction": 0.7,
    "weight_decay": 0.05,
}


def preset_settings(name: str | None, arch: str | None = None) -> dict[str, Any]:
    """Return the settings of a preset, with dropout and optimizer settings that suit `arch`.

    Args:
        name: The preset, or None for no settings.
        arch: The architecture that the user chose, or None for that of the preset.

    Raises:
        UserError: There is no such preset.
    """
    if name is None:
        return {}
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}.", f"Presets: {', '.join(PRESETS)}.")
    return PRESETS[name] | (QWEN3_SETTINGS if arch == "qwen3" else {})
