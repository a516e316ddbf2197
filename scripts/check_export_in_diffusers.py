#!/usr/bin/env python3
"""Does diffusers' own BlipDiffusionPipeline draw the same picture from our export?

Two commands for two environments, because that pipeline last works in diffusers 0.32.2 with transformers 4.46.3:

    python scripts/check_export_in_diffusers.py render MODEL_FOLDER CHECK_FOLDER
    OLD_ENVIRONMENT/bin/python scripts/check_export_in_diffusers.py compare CHECK_FOLDER

``render`` runs where blipdiff_train is installed: it exports the model into CHECK_FOLDER/export and draws one picture
from stored latents. ``compare`` needs nothing of blipdiff_train: it opens the export in the old libraries, draws the
same picture, prints the largest difference in [0, 1] and fails if that is above the tolerance. The old environment:

    python -m venv OLD_ENVIRONMENT
    OLD_ENVIRONMENT/bin/pip install torch diffusers==0.32.2 transformers==4.46.3 "huggingface_hub<1" pillow accelerate
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

TOLERANCE = 1e-3
REQUEST = {"prompt": "on a marble table", "negative_prompt": "lowres", "guidance": 7.5, "prompt_reps": 3}


def render(arguments: argparse.Namespace) -> int:
    """Export the model and draw the picture to be met."""
    import numpy as np
    from PIL import Image
    from safetensors.torch import save_file

    from blipdiff_train.checkpoints.export import export
    from blipdiff_train.checkpoints.model_folder import load_model_folder
    from blipdiff_train.inference.pipeline import SubjectPipeline

    folder = Path(arguments.check_folder)
    folder.mkdir(parents=True, exist_ok=True)
    export(arguments.model_folder, "diffusers", folder / "export")
    pipeline = SubjectPipeline(load_model_folder(folder / "export"))
    if arguments.subject_image:
        picture = Image.open(arguments.subject_image).convert("RGB")
    else:  # any picture does: the numbers are compared, not the drawing
        size = pipeline.parts.image_size
        noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)
    latents = pipeline.initial_latents([0], 1, pipeline.denoiser.default_size, pipeline.denoiser.default_size)
    image = pipeline.generate(
        picture,
        arguments.subject,
        REQUEST["prompt"],
        negative_prompt=REQUEST["negative_prompt"],
        guidance=REQUEST["guidance"],
        prompt_reps=REQUEST["prompt_reps"],
        steps=arguments.steps,
        template="release",
        latents=latents,
        fit="stretch",
        output="tensor",
    )
    picture.save(folder / "subject.png")
    save_file({"latents": latents, "image": image.contiguous()}, folder / "ours.safetensors")
    request = REQUEST | {"subject": arguments.subject, "steps": arguments.steps}
    (folder / "request.json").write_text(json.dumps(request, indent=2) + "\n")
    print(f"drawn {tuple(image.shape)}, values {image.min():.3f} to {image.max():.3f}, deviation {image.std():.3f}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Draw the picture with the pipeline of diffusers and compare."""
    import diffusers
    import torch
    import transformers
    from diffusers.pipelines import BlipDiffusionPipeline
    from diffusers.pipelines.blip_diffusion.modeling_blip2 import Blip2QFormerModel
    from PIL import Image
    from safetensors.torch import load_file

    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    folder = Path(arguments.check_folder)
    request = json.loads((folder / "request.json").read_text())
    ours = load_file(folder / "ours.safetensors")
    # the class asks the hub for bert-base-uncased, unless its config names a vocabulary
    config = transformers.Blip2Config.from_pretrained(folder / "export" / "qformer")
    config.tokenizer = str(folder / "export" / "qformer_tokenizer")
    qformer = Blip2QFormerModel.from_pretrained(folder / "export" / "qformer", config=config)
    pipeline = BlipDiffusionPipeline.from_pretrained(folder / "export", qformer=qformer)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        theirs = pipeline(
            [request["prompt"]],
            Image.open(folder / "subject.png"),
            [request["subject"]],
            [request["subject"]],
            latents=ours["latents"],
            guidance_scale=request["guidance"],
            num_inference_steps=request["steps"],
            neg_prompt=request["negative_prompt"],
            prompt_reps=request["prompt_reps"],
            output_type="pt",
        ).images
    largest = (theirs.clamp(0, 1) - ours["image"]).abs().max().item()
    verdict = "agrees" if largest <= TOLERANCE else "DIFFERS"
    print(
        f"diffusers {diffusers.__version__}, transformers {transformers.__version__}: largest difference {largest:.2e} "
        f"in [0, 1] over {tuple(theirs.shape)} (tolerance {TOLERANCE:g}): {verdict}"
    )
    return 0 if largest <= TOLERANCE else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "render", help="export a model folder and draw a picture (this project's environment)"
    )
    command.add_argument("model_folder")
    command.add_argument("check_folder")
    command.add_argument("--subject", default="dog", help="category word")
    command.add_argument("--subject-image", help="picture of the subject; a made-up one by default")
    command.add_argument("--steps", type=int, default=10)
    command.set_defaults(run=render)
    command = commands.add_parser("compare", help="draw it again with diffusers' pipeline (the old environment)")
    command.add_argument("check_folder")
    command.set_defaults(run=compare)
    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
