"""Measure DPO and GRPO on rows with an image side by side with TRL's.

    python benchmarks/vision.py --trl-python path/to/trl-env/bin/python --repeats 3

A LLaVA with random weights, of which the image encoder and the projector are frozen, reads one image of 256 tokens per row. Images
that went through the image encoder are counted on both sides, whoever calls it: policy, reference or sampler. Runs are processes
of their own and take turns, as in run.py.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import report
import run
import synthetic
from workloads import COMMON, ROUND, WARMUP, Target, Workload, remainder

SIDE, PATCH = 224, 14
IMAGE = "<|image|>"
WORDS = (20, 60)
TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}{{- '<|image|>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}
    {%- endif -%}
    {{- '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""


def _said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def preference_rows(count: int, *, seed: int) -> list[synthetic.Row]:
    """Pairs of 60 to 100 tokens on a question about an image; `number` says which."""
    rows = synthetic.preference_rows(count, seed=seed, prompt=WORDS)
    by_role = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    chats = [{name: _said(role, row[name]) for name, role in by_role.items()} for row in rows]
    return [chat | {"number": i} for i, chat in enumerate(chats)]


def prompt_rows(count: int, *, seed: int) -> list[synthetic.Row]:
    """Questions about an image."""
    rows = synthetic.prompt_rows(count, seed=seed, prompt=WORDS)
    return [{"prompt": _said("user", row["prompt"]), "number": i} for i, row in enumerate(rows)]


DPO = Workload(
    name="dpo-image",
    about="pairs of 60 to 100 tokens on one image and a question of 20 to 60 tokens, 4 pairs a step",
    trainer="DPOTrainer",
    config_class="DPOConfig",
    rows=preference_rows,
    rows_per_step=4,
    config={"per_device_train_batch_size": 4, "max_length": 1024, "beta": 0.1},
    targets={"trl": Target(time=0.5, memory=0.6)},
)
GRPO = Workload(
    name="grpo-image",
    about="4 images with a question of 20 to 60 tokens × 8 completions of at most 64, ended at random, a step",
    trainer="GRPOTrainer",
    config_class="GRPOConfig",
    rows=prompt_rows,
    rows_per_step=4,
    config=ROUND | {"gradient_accumulation_steps": 4},
    targets={"trl": Target(time=0.5, memory=0.6)},
    same_batches=False,
    arguments=lambda: {"reward_funcs": remainder},
)
WORKLOADS = {workload.name: workload for workload in (DPO, GRPO)}


# ---- in a worker ----


def make_processor() -> Any:
    """The benchmark's tokenizer with a token for an image, and pixels as CLIP wants them."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = synthetic.tokenizer()
    words.add_special_tokens({"additional_special_tokens": [IMAGE]})
    words.image_token, words.image_token_id = IMAGE, words.convert_tokens_to_ids(IMAGE)
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size=size, crop_size=size, do_resize=False, do_center_crop=False)
    return LlavaProcessor(
        images, words, patch_size=PATCH, vision_feature_select_strategy="default", image_token=IMAGE,
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def make_model(words: Any, *, seed: int) -> Any:
    """The benchmark's Llama behind a CLIP tower of 6 layers × 256, which is frozen."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, set_seed

    text = synthetic.model(seed=seed).config
    text.vocab_size = len(words)
    sizes = {"hidden_size": 256, "intermediate_size": 1_024, "num_hidden_layers": 6, "num_attention_heads": 4}
    tower = CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH)
    set_seed(seed)
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=words.image_token_id, vision_feature_layer=-1,
        tie_word_embeddings=True,
    )  # fmt: skip
    return synthetic.ending_at_random(LlavaForConditionalGeneration(config))


def load_model(directory: Path) -> Any:
    """The saved model, with its image encoder and projector frozen."""
    import torch
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(directory / "vision", dtype=torch.float32)
    for part in (model.model.vision_tower, model.model.multi_modal_projector):
        part.requires_grad_(False)
    return model


def picture(number: int) -> Any:
    """Noise in squares of 14 pixels."""
    from PIL import Image

    generator = random.Random(number)
    small = Image.frombytes("RGB", (SIDE // PATCH, SIDE // PATCH), generator.randbytes(3 * (SIDE // PATCH) ** 2))
    return small.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def read_rows(workload: Workload, directory: Path) -> Any:
    """The rows with their images, as a dataset."""
    from datasets import Dataset, Features, Image, List, Value

    rows = [dict(row) for row in workload.read_rows(directory)]
    for row in rows:
        row["images"] = [picture(row.pop("number"))]
    chat = List({"role": Value("string"), "content": Value("string")})
    features = Features({name: List(Image()) if name == "images" else chat for name in rows[0]})
    return Dataset.from_list(rows, features=features)


class ImageCounter:
    """The number of images that image encoders were given, whoever called them, by step."""

    def __init__(self) -> None:
        from torch.nn.modules.module import register_module_forward_pre_hook
        from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

        self.seen, self.by_step, self._kind = 0, [], CLIPVisionEmbeddings
        register_module_forward_pre_hook(self._count)

    def _count(self, module: Any, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, self._kind):
            self.seen += arguments[0].shape[0]

    def end_step(self) -> None:
        """Note what was seen since the last call."""
        self.by_step.append(self.seen)
        self.seen = 0


def clock(images: ImageCounter, **options: Any) -> Any:
    """The clock of worker.py, which also ends the steps of `images`."""
    import worker

    class Clock(worker.Clock):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            super().on_step_end(args, state, control, **kwargs)
            images.end_step()

    return Clock(**options)


def work(arguments: argparse.Namespace) -> None:
    """Train as one side does, and write what was measured."""
    import worker

    recorder, workload = worker.Recorder(), WORKLOADS[arguments.workload]
    processor, model = make_processor(), load_model(arguments.dir)
    options = COMMON | workload.config | arguments.options
    options |= {"output_dir": str(arguments.dir / "out"), "max_steps": WARMUP + arguments.steps, "seed": arguments.seed}
    started = time.perf_counter()
    parts = {"model": model, "train_dataset": read_rows(workload, arguments.dir), "processing_class": processor}
    parts |= workload.arguments()
    counter, images = worker.Counter(processor.tokenizer.pad_token_id), ImageCounter()
    trainer = worker.counted_trainer(arguments.side, workload, options, parts, counter)
    recorder.prepared(model, started)
    counter.watch(model.get_input_embeddings())
    last = WARMUP + arguments.steps
    ours = arguments.side == "ours"
    trainer.add_callback(clock(images, recorder=recorder, counter=counter, counts_itself=ours, last=last))
    trainer.train()
    recorder.peak_mib = worker.memory_mib("VmHWM")
    written = recorder.result(arguments.side) | {"images": images.by_step[WARMUP:last]}
    arguments.out.write_text(json.dumps(written))


# ---- the comparison ----


def write_model(directory: Path, *, seed: int) -> None:
    """Save what every worker loads."""
    make_model(make_processor().tokenizer, seed=seed).save_pretrained(directory / "vision")


def image_grid(result: dict[str, Any]) -> report.Grid:
    """Images per step that went through an image encoder."""
    cells = [
        [name, *(f"{median(runs[0]['images']):.0f}" for runs in workload["runs"].values())]
        for name, workload in result["workloads"].items()
    ]
    return report.Grid("Images encoded per step", ["workload", "ours", "trl"], cells)


def compare(arguments: argparse.Namespace) -> None:
    """Let the sides take turns, and print the tables."""
    chosen = [WORKLOADS[name] for name in arguments.workloads.split(",")]
    run.compare_sides(arguments, chosen, write_model, worker=Path(__file__), grids=[image_grid])


def main() -> None:
    parser = run.sides_parser(__doc__, "1.16.0", WORKLOADS, out="vision.json")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    run.play_part(parser.parse_args(), work, compare)


if __name__ == "__main__":
    main()
