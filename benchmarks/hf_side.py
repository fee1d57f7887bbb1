"""The Hugging Face side of `hf_side_by_side`: transformers' Llama 4 on torch, run as a worker process.

Variants: `sdpa` is eager torch with its fused attention, `compile` the same model through `torch.compile` (inductor;
decoding with the static cache it needs). The mixture there multiplies every token with every expert and zeroes what
the router did not choose: its result is right, its work is num_experts / top_k times the routed work.
"""

from __future__ import annotations

import contextlib
import time

import numpy as np
import torch
import transformers

from benchmarks import machine, worker, workload
from llama4_jax.config import Llama4Config, presets


def hf_config(config: Llama4Config) -> transformers.Llama4TextConfig:
    """The same text model in transformers' words."""
    text, attention, moe = config.text, config.text.attention, config.text.moe
    return transformers.Llama4TextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.embed_dim,
        intermediate_size=moe.expert_dim,
        intermediate_size_mlp=text.mlp_dim,
        num_hidden_layers=text.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        interleave_moe_layer_step=moe.step,
        no_rope_layer_interval=attention.nope_interval,
        use_qk_norm=attention.qk_norm,
        attention_chunk_size=attention.chunk_size,
        attn_temperature_tuning=attention.temperature_tuning,
        floor_scale=attention.floor_scale,
        attn_scale=attention.attn_scale,
        rope_parameters={"rope_type": "default", "rope_theta": attention.rope_theta},
        rms_norm_eps=text.norm_eps,
        tie_word_embeddings=text.tie_embeddings,
        max_position_embeddings=text.context_length,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )


def make(folder: str, seed: int) -> float:
    """Writes a checkpoint with random weights to `folder`; returns its size in millions of parameters."""
    torch.manual_seed(seed)
    model = transformers.Llama4ForCausalLM(hf_config(presets.bench_151m()))
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


class HuggingFace:
    """A loaded checkpoint and the timed calls on it. `prepare` compiles and warms up a case, `run` times it once."""

    def __init__(self):
        self._cases = {}

    def load(self, folder: str, dtype: str) -> None:
        self.model = transformers.Llama4ForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self._compiled = torch.compile(self.model)

    def logits(self, path: str) -> None:
        """Saves the float32 logits [b t v] of the shared prompt to `path`."""
        with torch.inference_mode():
            out = self.model(torch.from_numpy(workload.prefill_tokens()), use_cache=False)
        np.save(path, out.logits.float().numpy())

    def prepare(self, case: str, variant: str) -> float:
        """Builds and warms up one case; returns the seconds that took, compilation included."""
        started = time.perf_counter()
        build = {"prefill": self._prefill, "train": self._train}.get(case, self._decode)
        call = build(case, variant)
        for _ in range(2):
            call()
        self._cases[case, variant] = call
        return time.perf_counter() - started

    def run(self, case: str, variant: str) -> dict[str, float]:
        """Seconds of one repetition, by what was timed."""
        return self._cases[case, variant]()

    def release(self, case: str, variant: str) -> None:
        self._cases.pop((case, variant))

    def train_memory(self, variant: str) -> dict[str, float]:
        """Bytes resident at the peak of a warm training step, and the loss of the first step."""
        step = self._train("train", variant)
        loss = step()["loss"]
        step()
        machine.peak_memory_reset()
        idle = machine.resident_memory()
        step()
        return {"peak": machine.peak_memory(), "idle": idle, "loss": loss}

    def _prefill(self, case: str, variant: str):
        model = self._compiled if variant == "compile" else self.model
        tokens = torch.from_numpy(workload.prefill_tokens())

        def call():
            with torch.inference_mode(), workload.timed() as timing:
                model(tokens, use_cache=False)
            return timing

        return call

    def _decode(self, case: str, variant: str):
        prompts = torch.from_numpy(workload.prompts(batch=workload.decode_batch(case)))
        options = {"do_sample": False, "attention_mask": torch.ones_like(prompts)}
        if variant == "compile":
            compile_config = transformers.CompileConfig(fullgraph=False, mode="default")
            compile_config._compile_all_devices = True  # without it transformers compiles on accelerators only
            options |= {"cache_implementation": "static", "compile_config": compile_config}

        def generate(count: int) -> float:
            with workload.timed() as timing:
                self.model.generate(prompts, max_new_tokens=count, min_new_tokens=count, **options)
            return timing["seconds"]

        def call():
            return workload.decode_seconds(generate)

        return call

    def _train(self, case: str, variant: str):
        model = self._compiled if variant == "compile" else self.model
        tokens = torch.from_numpy(workload.train_tokens())
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **workload.ADAMW)

        def call():
            with self._training(), workload.timed() as timing:
                loss = model(inputs, labels=targets, shift_labels=targets, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return timing | {"loss": float(loss.detach())}

        return call

    @contextlib.contextmanager
    def _training(self):
        self.model.train()
        yield
        self.model.eval()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    side = HuggingFace()
    names = ("load", "logits", "prepare", "run", "release", "train_memory")
    worker.serve({"make": make} | {name: getattr(side, name) for name in names})
