"""Cases of the text encoder with a subject, of stage 2's loss, and of generation: load, run, compare."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blipdiff_train.checkpoints import diffusers as diffusers_folder
from blipdiff_train.checkpoints.tokenizers import load_clip_tokenizer
from blipdiff_train.checkpoints.transformers import load_clip_text
from blipdiff_train.inference.control import ControlPipeline, load_controlnet
from blipdiff_train.inference.pipeline import SubjectPipeline
from blipdiff_train.losses.diffusion import noise_prediction_loss_per_sample
from blipdiff_train.models.denoiser import Denoiser
from blipdiff_train.models.subject_encoder import SubjectProjection
from blipdiff_train.models.text_encoder import TextEncoder

from .runner import (
    LOSS_TOLERANCE,
    Case,
    Comparison,
    compare_activation,
    compare_gradients,
    largest_difference,
    register,
)

LATENT_TOLERANCE = 2e-4  # latents and guided predictions reach 30 to 40
IMAGE_TOLERANCE = 1e-3  # in [0, 1]
RESIDUAL_TOLERANCE = 1e-5


# ---- the text encoder ----------------------------------------------------------------------------------------------


@register(
    "text encoder with a subject", lambda case: "prompts" in case.info and case.has("tokenizer", "outputs.safetensors")
)
def run_text_encoder(case: Case) -> dict[str, Comparison]:
    """diffusers' ``ContextCLIPTextModel``: padded and not, without a subject, with a position for each row."""
    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    encoder = TextEncoder(load_clip_text(case.folder), load_clip_tokenizer(case.folder / "tokenizer")).eval()
    prompts, ctx, mixed_pos = case.info["prompts"], inputs["ctx"], inputs["mixed_pos"]
    first = ctx[: len(inputs["ids_short"])]
    without = torch.zeros(len(prompts["ids_77"]), *ctx.shape[1:])
    dropped = torch.tensor([False] * len(ctx) + [True] * len(without))
    with torch.no_grad():
        from_ids = {
            "padded_ctx2": encoder.encode(inputs["ids_padded"], ctx, 2),
            "padded_ctx_mixed": encoder.encode(inputs["ids_padded"], ctx, mixed_pos),
            "no_ctx": encoder.encode(inputs["ids_77"]),
            "unpadded_ctx2": encoder.encode(inputs["ids_short"], first, 2),
        }
        from_text = {
            "padded_ctx2": encoder(prompts["ids_padded"], ctx),
            "padded_ctx_mixed": encoder(prompts["ids_padded"], ctx, subject_position=mixed_pos.tolist()),
            "no_ctx": encoder(prompts["ids_77"]),
            "unpadded_ctx2": encoder(prompts["ids_short"], first, pad=False),
        }
        mixed = encoder([*prompts["ids_padded"], *prompts["ids_77"]], torch.cat([ctx, without]), dropped)
    found = {}
    for name, recorded in outputs.items():
        if name.endswith(".pooled"):
            continue  # taken Q positions too early, used by nothing, not computed here
        found[name] = compare_activation(case, name, from_ids[name], recorded)
        found[f"{name} (from text)"] = compare_activation(case, name, from_text[name], recorded)
    recorded = torch.cat([outputs["padded_ctx2"], outputs["no_ctx"]])
    found["rows with and without a subject in one batch"] = compare_activation(case, "no_ctx", mixed, recorded)
    return found


# ---- the loss ------------------------------------------------------------------------------------------------------


@register("stage 2", lambda case: case.has("unet", "vae", "proj_layer.safetensors", "grads.safetensors"))
def run_stage2_loss(case: Case) -> dict[str, Comparison]:
    """LAVIS's ``BlipDiffusion.forward``: every intermediate, the loss and all recorded gradients."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(**case.info["noise_scheduler"]["config"])
    vae, config = diffusers_folder.load_vae(case.folder), case.info["config"]
    # LAVIS multiplies by a literal, whatever the VAE's configuration says
    vae.register_to_config(scaling_factor=config.get("latent_scale", vae.config.scaling_factor))
    denoiser = Denoiser(vae, diffusers_folder.load_unet(case.folder), schedule)
    text_encoder = TextEncoder(
        load_clip_text(case.folder, subfolder="text_encoder"), load_clip_tokenizer(case.folder / "tokenizer")
    )
    weights = case.tensors("proj_layer.safetensors")
    projection = SubjectProjection(
        weights["dense2.weight"].shape[0],
        weights["dense1.weight"].shape[0],
        layer_norm_eps=config.get("proj_layer", {}).get("LayerNorm_eps", 1e-12),
    )
    projection.load_state_dict(weights)
    modules = {"proj_layer": projection.eval(), "text_encoder": text_encoder.eval(), "unet": denoiser.eval().unet}

    inputs = case.tensors("inputs.safetensors")
    found = {
        f"alphas_cumprod[{timestep}]": Comparison(abs(float(denoiser.alphas_cumprod[int(timestep)]) - value), 1e-7)
        for timestep, value in case.info["noise_scheduler"].get("alphas_cumprod", {}).items()
    }
    for suffix in ("", "_padded"):
        if not case.has(f"outputs{suffix}.safetensors"):
            continue
        captions = case.info[f"captions{suffix}"]
        outputs, recorded = case.tensors(f"outputs{suffix}.safetensors"), case.tensors(f"grads{suffix}.safetensors")
        for module in modules.values():
            module.zero_grad(set_to_none=True)
        multimodal_embeds = inputs["multimodal_embeds"].clone().requires_grad_()

        subject_embeds = projection(multimodal_embeds)
        position = config["ctx_begin_pos"]
        prompt_embeds = text_encoder(captions, subject_embeds, subject_position=position, pad=bool(suffix))
        moments = denoiser.encode_moments(inputs["tgt_image"])
        latents = denoiser.sample_latents(moments, inputs["posterior_eps"])
        noisy_latents = denoiser.add_noise(latents, inputs["noise"], inputs["timesteps"])
        noise_pred = denoiser.predict_noise(noisy_latents, inputs["timesteps"], prompt_embeds)
        target = denoiser.training_target(latents, inputs["noise"], inputs["timesteps"])
        loss = noise_prediction_loss_per_sample(noise_pred, target).mean()
        loss.backward()

        mean, log_variance = moments.chunk(2, dim=1)
        tensors = {
            "ctx_embeddings": subject_embeds,
            "encoder_hidden_states": prompt_embeds,
            "posterior_mean": mean,
            "posterior_std": (0.5 * log_variance).exp(),
            "latents": latents,
            "noisy_latents": noisy_latents,
            "noise_pred": noise_pred,
        }
        label = " (padded)" if suffix else ""
        for name, tensor in tensors.items():
            if name in outputs:
                found[f"{name}{label}"] = compare_activation(case, name, tensor, outputs[name])
        found[f"loss{label}"] = Comparison(largest_difference(loss, outputs["loss"]), LOSS_TOLERANCE)
        gradients = {
            name: multimodal_embeds.grad if name == "multimodal_embeds" else _parameter(modules, name).grad
            for name in recorded  # a selection of all parameters
        }
        found |= {f"{name}{label}": value for name, value in compare_gradients(gradients, recorded).items()}
    return found


def _parameter(modules: dict[str, torch.nn.Module], name: str) -> torch.nn.Parameter:
    part, _, rest = name.partition(".")
    return modules[part].get_parameter(rest.replace("text_model.", "model.", 1) if part == "text_encoder" else rest)


# ---- generation ----------------------------------------------------------------------------------------------------


@register(
    "generation", lambda case: "calls" in case.info and case.has("pipeline") and not case.has("pipeline/controlnet")
)
def run_generate(case: Case) -> dict[str, Comparison]:
    """diffusers' ``BlipDiffusionPipeline.__call__``: each recorded call, step by step."""
    pipeline = load_pipeline(case)
    found = {}
    for name, call in case.info["calls"].items():
        found |= {f"{quantity} ({name})": value for quantity, value in compare_call(case, name, call, pipeline).items()}
    return found


def load_pipeline(case: Case) -> SubjectPipeline:
    return SubjectPipeline(
        diffusers_folder.load(case.folder / "pipeline", bert_tokenizer=case.folder / "bert_tokenizer")
    )


def compare_call(
    case: Case, name: str, call: dict[str, Any], pipeline: SubjectPipeline, **options: Any
) -> dict[str, Comparison]:
    """Everything recorded of one call; ``options`` go to our ``generate`` (a ControlNet's)."""
    recorded = case.tensors(f"{name}.safetensors")
    rounding = Case(case.folder, call)  # recorded for each call
    images = [Image.open(case.folder / file) for file in call["reference_images"]]
    subjects, guided = call["source_subject_category"], call["guidance_scale"] > 1
    predictions, trajectory = [], []

    def on_step(step: int, prediction: Tensor, latents: Tensor) -> None:
        predictions.append(prediction)
        trajectory.append(latents)

    latents = pipeline.generate(
        images,
        subjects,
        call["prompt"],
        target_subject=call["target_subject_category"],
        steps=call["num_inference_steps"],
        guidance=call["guidance_scale"],
        template="release",
        prompt_strength=call.get("prompt_strength", 1.0),
        prompt_reps=call.get("prompt_reps", 20),
        negative_prompt=call["neg_prompt"],
        latents=recorded["initial_latents"],
        fit="stretch",  # diffusers' way
        batch_size=len(recorded["initial_latents"]),
        on_step=on_step,
        output="latent",
        **options,
    )
    embeds = [pipeline.embed_subject(image, text, fit="stretch") for image, text in zip(images, subjects, strict=True)]
    negative_prompts = [call["neg_prompt"]] * len(call["prompt"])
    conditions = pipeline.encode_prompts(
        call["built_prompts"], torch.stack(embeds), 2, negative_prompts=negative_prompts if guided else None
    )
    states = [conditions.negative_embeds, conditions.prompt_embeds] if guided else [conditions.prompt_embeds]
    sampler = pipeline.denoiser.make_scheduler("pndm")
    sampler.set_timesteps(call["num_inference_steps"])
    tensors = {
        "qformer_pixel_values": torch.stack([pipeline.preprocess(image, fit="stretch") for image in images]),
        "query_embeds": torch.stack(embeds),
        "prompt_embeds": conditions.prompt_embeds,
        "encoder_hidden_states": torch.cat(states),
    }
    steps = {
        "noise_pred_per_step": (torch.stack(predictions), LATENT_TOLERANCE),
        "latents_per_step": (torch.stack(trajectory), LATENT_TOLERANCE),
        "final_latents": (latents, LATENT_TOLERANCE),
        "decoded": (pipeline.denoiser.decode_raw(latents), IMAGE_TOLERANCE),
        "image": (pipeline.denoiser.decode(latents).permute(0, 2, 3, 1), IMAGE_TOLERANCE),
        "timesteps": (sampler.timesteps, 0.0),
    }
    length = pipeline.text_encoder.max_length
    for quantity, texts, max_length in (
        ("prompt_ids", call["built_prompts"], length - embeds[0].shape[0]),
        ("uncond_ids", negative_prompts, length),
    ):
        rows, _ = pipeline.text_encoder.tokenize(texts, [max_length] * len(texts))
        steps[quantity] = (torch.tensor(rows), 0.0)
    if call.get("generator_seed") is not None:
        # the reference draws a batch's noise as one block from one generator
        generator = torch.Generator().manual_seed(call["generator_seed"])
        steps["initial_latents"] = (torch.randn(recorded["initial_latents"].shape, generator=generator), 0.0)

    found = {}
    for quantity in recorded:
        if quantity in tensors:
            found[quantity] = compare_activation(rounding, quantity, tensors[quantity], recorded[quantity])
        elif quantity in steps:
            ours, tolerance = steps[quantity]
            found[quantity] = Comparison(largest_difference(ours, recorded[quantity]), tolerance)
    return found


@register("generation with a ControlNet", lambda case: "calls" in case.info and case.has("pipeline/controlnet"))
def run_controlnet(case: Case) -> dict[str, Comparison]:
    """diffusers' ``BlipDiffusionControlNetPipeline.__call__``: each recorded call, step by step."""
    parts = diffusers_folder.load(case.folder / "pipeline", bert_tokenizer=case.folder / "bert_tokenizer")
    pipeline = ControlPipeline(parts, load_controlnet(case.folder / "pipeline" / "controlnet"))
    control_image = Image.open(case.folder / "control.png")
    residuals: list[tuple[list[Tensor], Tensor]] = []
    pipeline.controlnet.register_forward_hook(lambda module, arguments, output: residuals.append(output))
    found = {}
    for name, call in case.info["calls"].items():
        residuals.clear()
        compared = compare_call(case, name, call, pipeline, control_image=control_image)
        recorded = case.tensors(f"{name}.safetensors")
        down, mid = residuals[0]
        ours = {
            "control_image": pipeline.preprocess_control(control_image, call["height"], call["width"])[None],
            "controlnet_mid_step0": mid,
            "controlnet_down0_step0": down[0],
            "controlnet_down_last_step0": down[-1],
        }
        exact = "control_image"
        compared[exact] = compare_activation(Case(case.folder, call), exact, ours.pop(exact), recorded[exact])
        for quantity, tensor in ours.items():
            if (
                quantity in recorded
            ):  # residuals of untrained ControlNets reach 1e5: only their relative error says something
                error = largest_difference(tensor, recorded[quantity]) / float(recorded[quantity].abs().max())
                compared[f"{quantity}, relative"] = Comparison(error, RESIDUAL_TOLERANCE)
        found |= {f"{quantity} ({name})": value for quantity, value in compared.items()}
    return found
