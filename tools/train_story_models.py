"""Trains the two small story models that the tests and `hf-fastpath demo --family` use: an LFM2-MoE and a GPT-2.

No checkpoint of these families is small enough to ship, and random weights say nothing about quantization. Their text
is sampled from a small Llama that writes children's stories (the 15M-parameter TinyStories model of llama2.c, say), so
no data set is needed. On one H200 it takes about six minutes; it needs torch, transformers, tokenizers, safetensors:

    python tools/train_story_models.py --stories PATH_OF_THE_LLAMA --out FOLDER

Sizes are what the CUDA kernels take: hidden and expert sizes are multiples of 128, heads have 64 channels. Training
stops by the clock, so a second run gives other weights of the same quality.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.moe import ExpertsInterface
from transformers.models.lfm2_moe import modeling_lfm2_moe

VOCABULARY, LENGTH = 2048, 512
PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<bos>", "<eos>")
TEMPERATURE = 0.9
PEAK_RATE, WARMUP, DECAY = 3e-3, 0.03, 0.1
BALANCE = 1e-3  # how fast an expert's bias moves towards an even load

CARD = """\
---
license: apache-2.0
language: en
---
# Two small story models

`lfm2_moe/` (bf16) and `gpt2/` (fp16) exist to test hf_fastpath: they write simple children's stories, and nothing else.
`tools/train_story_models.py` made them in one run on one GPU, from random weights.

| | parameters | tokens read | steps | held-out perplexity |
|---|---|---|---|---|
{rows}

Their {stories:,} training stories ({tokens:,} tokens of a byte-level BPE of {vocabulary:,} entries, trained on the same
stories) were sampled at temperature {temperature} from a Llama of 15M parameters that was trained on TinyStories (Eldan
and Li, 2023). `held_out.txt` holds {held_out} stories of the same run that neither was
trained on, `<eos><bos>` between them.

Licence: the weights, the tokenizer and `held_out.txt` are Apache-2.0, like the rest of the repository. They contain
neither weights nor tokenizer entries of the model that was sampled from, nor text of a data set.
"""


@torch.no_grad()
def sample_stories(folder: Path, device: str, seconds: float, batch: int, seed: int) -> list[str]:
    """Stories written by the causal language model in ``folder``, until ``seconds`` have passed."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.to(device).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    length = model.config.max_position_embeddings
    generator = torch.Generator(device).manual_seed(seed)
    ends, stories, tokens, start = {model.config.bos_token_id, model.config.eos_token_id}, [], 0, time.perf_counter()
    with tqdm(desc="Sampling stories", unit="token", unit_scale=True) as bar:
        while time.perf_counter() - start < seconds:
            written = torch.full((batch, 1), model.config.bos_token_id, device=device)
            rows, cache = [written], None
            for _ in range(length - 1):
                out = model(input_ids=rows[-1], past_key_values=cache, use_cache=True)
                cache, logits = out.past_key_values, out.logits[:, -1].float()
                # The largest of log-likelihood plus Gumbel noise is a sample of the distribution.
                noise = torch.empty_like(logits).exponential_(generator=generator).log_()
                rows.append((logits / TEMPERATURE).sub_(noise).argmax(-1, keepdim=True))
            pieces = [piece for row in torch.cat(rows, dim=1).tolist() for piece in _split(row, ends)]
            stories += [text.strip() for text in tokenizer.decode_batch(pieces)]
            tokens += batch * length
            bar.update(batch * length)
    return [story for story in stories if len(story) > 200]


def _split(row: list[int], ends: set[int]) -> Iterator[list[int]]:
    piece: list[int] = []
    for token in row:
        if token in ends:
            yield piece
            piece = []
        else:
            piece.append(token)
    yield piece  # cut off by the model's length; its words are as good


def train_tokenizer(stories: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``VOCABULARY`` entries that begins every text with ``<bos>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(stories[:20_000], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LENGTH, **names)


def encode(tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> torch.Tensor:
    """All stories one after the other, each between ``<bos>`` and ``<eos>``: int16 ``(tokens,)``."""
    rows = tokenizer.backend_tokenizer.encode_batch(stories)
    return torch.cat([torch.tensor([*row.ids, EOS], dtype=torch.int16) for row in rows])


def make_lfm2_moe() -> Lfm2MoeForCausalLM:
    """Convolution and attention, two dense layers and three with eight experts."""
    config = Lfm2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=384,
        moe_intermediate_size=128,
        num_hidden_layers=5,
        layer_types=["conv", "full_attention", "conv", "full_attention", "conv"],
        num_dense_layers=2,
        num_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return Lfm2MoeForCausalLM(config)


def make_gpt2() -> GPT2LMHeadModel:
    """Three layers."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=256,
        n_layer=3,
        n_head=4,
        n_inner=768,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return GPT2LMHeadModel(config)


def every_expert(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """All experts on all tokens, as two products: with so few and small ones faster than sorting the tokens."""
    tokens, count = hidden_states.shape[0], experts.num_experts
    share = hidden_states.new_zeros(tokens, count).scatter(1, top_k_index, top_k_weights.to(hidden_states.dtype))
    both = nn.functional.linear(hidden_states, experts.gate_up_proj.flatten(0, 1)).view(tokens, count, -1)
    gate, up = both.chunk(2, dim=-1)
    inner = nn.functional.silu(gate) * up * share.unsqueeze(-1)
    return inner.flatten(1) @ experts.down_proj.transpose(1, 2).flatten(0, 1)


def shifted_convolution(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *_: Any, **__: Any
) -> torch.Tensor:
    """The causal depthwise convolution as a sum of shifted products, whose gradient is faster than cuDNN's."""
    taps, length = weight.shape[-1], hidden_states.shape[-1]
    padded = nn.functional.pad(hidden_states, (taps - 1, 0))
    out = sum(padded[..., tap : tap + length] * weight[:, tap, None] for tap in range(taps))
    return out if bias is None else out + bias[:, None]  # type: ignore[return-value]


class Balance:
    """Keeps the experts' loads even without a loss term: the bias of those chosen too often falls (Wang et al., 2024,
    "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts")."""

    def __init__(self, model: nn.Module) -> None:
        self.loads: list[tuple[Any, torch.Tensor]] = []
        for module in model.modules():
            if isinstance(module, modeling_lfm2_moe.Lfm2MoeSparseMoeBlock):
                module.gate.register_forward_hook(lambda gate, args, out, block=module: self._note(block, out[2]))

    def _note(self, block: Any, chosen: torch.Tensor) -> None:
        if block.training:
            self.loads.append((block, torch.bincount(chosen.flatten(), minlength=block.gate.num_experts).float()))

    @torch.no_grad()
    def step(self) -> None:
        for block, load in self.loads:
            block.expert_bias += BALANCE * (load.mean() - load).sign()
        self.loads.clear()


def rate(progress: float) -> float:
    """Of the peak, at a share of the time: a linear rise, then half a cosine down to 2%."""
    if progress < WARMUP:
        return max(progress / WARMUP, 0.01)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))) / 2


def train(model: Any, ids: torch.Tensor, seconds: float, batch: int, name: str) -> int:
    """Trains for ``seconds`` on random windows of ``ids``; returns the number of steps."""
    device = ids.device.type
    groups = [[p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False)]
    settings = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (DECAY, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(settings, lr=PEAK_RATE, betas=(0.9, 0.95), fused=device == "cuda")
    balance, model = Balance(model), model.train()
    window = torch.arange(LENGTH + 1, device=ids.device)
    start, steps, progress = time.perf_counter(), 0, 0.0
    with tqdm(total=100, desc=f"Training {name}", unit="%", bar_format="{l_bar}{bar}| {postfix}") as bar:
        while progress < 1:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * rate(progress)
            rows = ids[torch.randint(len(ids) - LENGTH, (batch, 1), device=ids.device) + window].long()
            with torch.autocast(device, torch.bfloat16):
                logits = model(input_ids=rows[:, :-1], use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            balance.step()
            steps += 1
            if steps % 20 == 1:
                bar.n = int(100 * progress)
                bar.set_postfix_str(f"step {steps}, loss {loss.item():.3f}")  # item() also waits for the GPU
            progress = min(1.0, (time.perf_counter() - start) / seconds)
    return steps


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of the windows of ``LENGTH`` tokens that ``ids`` divides into."""
    model = model.eval()
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH).long()
    losses = []
    for part in rows.split(16):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean().exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=Path, required=True, help="folder of the model that writes the stories")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sample-seconds", type=float, default=120)
    parser.add_argument("--sample-batch", type=int, default=4096)
    parser.add_argument("--train-seconds", type=float, nargs=2, default=(150, 70), metavar=("LFM2_MOE", "GPT2"))
    parser.add_argument("--train-batch", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=160, help="stories that no model is trained on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(args.seed)
    begun = time.perf_counter()
    stories = sample_stories(args.stories, args.device, args.sample_seconds, args.sample_batch, args.seed)
    sampled = time.perf_counter() - begun
    random.Random(args.seed).shuffle(stories)
    held_out, stories = stories[: args.held_out], stories[args.held_out :]
    if not stories:
        raise SystemExit(f"only {len(held_out)} stories were sampled: give --sample-seconds more time")
    # With the tokens that stand between stories, so that tokenizing the file gives what the models are trained on.
    (args.out / "held_out.txt").write_text("<eos><bos>".join(held_out) + "<eos>", encoding="utf-8")
    tokenizer = train_tokenizer(stories)
    ids, test_ids = (encode(tokenizer, part).to(args.device) for part in (stories, held_out))
    print(f"{len(stories):,} stories, {len(ids):,} tokens, sampled in {sampled:.0f} s", flush=True)

    ExpertsInterface.register("every_expert", every_expert)
    modeling_lfm2_moe.causal_conv1d_fn = shifted_convolution
    report: dict[str, Any] = {"stories": len(stories), "tokens": len(ids), "sampling_s": round(sampled, 1)}
    plans = (("lfm2_moe", make_lfm2_moe, torch.bfloat16), ("gpt2", make_gpt2, torch.float16))
    for (name, make, dtype), seconds in zip(plans, args.train_seconds, strict=True):
        model: Any = make().to(args.device)
        if name == "lfm2_moe":
            model.set_experts_implementation("every_expert")
        steps = train(model, ids, seconds, args.train_batch, name)
        before, after = (perplexity(model.to(kind), test_ids) for kind in (torch.float32, dtype))
        model.save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)
        report[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": steps,
            "tokens_read": steps * args.train_batch * LENGTH,
            "perplexity_float32": round(before, 3),
            "perplexity": round(after, 3),
        }
        print(name, report[name], flush=True)
        prompt = torch.tensor([tokenizer("Once upon a time").input_ids], device=args.device)
        print(tokenizer.decode(model.generate(prompt, max_new_tokens=120, do_sample=False)[0]), flush=True)
    columns = "| `{name}` | {parameters:,} | {tokens_read:,} | {steps:,} | {perplexity} |"
    rows = "\n".join(columns.format(name=name, **report[name]) for name, *_ in plans)
    sizes = {"stories": len(stories), "tokens": len(ids), "held_out": len(held_out)}
    card = CARD.format(rows=rows, vocabulary=VOCABULARY, temperature=TEMPERATURE, **sizes)
    (args.out / "README.md").write_text(card, encoding="utf-8")
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
