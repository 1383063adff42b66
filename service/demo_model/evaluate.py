"""What the demo model can do: bits per byte on held-out documents, and replies to fixed prompts.

    python -m service.demo_model.evaluate [--model FOLDER] [--data CORPORA] [--people FILE] [--replies FILE]

Bits per byte are the bits of every token after a document's first, role and end tokens included, over the
UTF-8 bytes of its turns' text; a document longer than the context is read in windows that do not overlap.
The replies are not selected: every prompt below is answered once, in its conversation. Needs `transformers`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.demo_model import path
from service.demo_model.corpora import CORPORA, Document, held_out, read, self_dialogue
from service.demo_model.prepare import encode
from service.demo_model.tokenizer import MAX_POSITIONS

# Ten casual conversations of three user turns.
PROMPTS = (
    ("Hi! How are you today?", "I went for a long walk this morning.", "What do you like to do on weekends?"),
    ("Have you seen any good movies lately?", "Who was in it?", "I think I will watch it tonight."),
    ("What is your favorite kind of music?", "Why do you like it?", "I play the guitar a little."),
    ("I just adopted a puppy!", "He is a golden retriever.", "Any tips for training him?"),
    ("Did you watch the game last night?", "My team lost again.", "Maybe next season will be better."),
    ("I am so tired today.", "Work has been very busy.", "Do you think I should take a vacation?"),
    ("What should I cook for dinner?", "I have some chicken and rice.", "Thanks, that sounds great."),
    ("Do you read a lot?", "I love mystery novels.", "Have you read any Sherlock Holmes?"),
    ("I am learning to program in Go.", "It is harder than I expected.", "What project should I try first?"),
    ("Can you find me a restaurant in Chicago?", "Italian, please.", "Great, thank you. Goodbye!"),
)


@torch.inference_mode()
def bits_per_byte(model: Any, tokenizer: Tokenizer, corpus: str, data: Path) -> float:
    documents = [document for document in read(corpus, data) if held_out(corpus, document)]
    windows = [
        torch.tensor(ids[at : at + MAX_POSITIONS + 1])
        for ids in encode(tokenizer, documents)
        for at in range(0, len(ids) - 1, MAX_POSITIONS)
    ]
    total = 0.0
    for window in windows:
        logits = model(window[None, :-1]).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return total / math.log(2) / sum(document.text_bytes for document in documents)


@torch.inference_mode()
def history_helps(model: Any, tokenizer: Tokenizer, file: Path) -> dict[str, list[float]]:
    """Bits per byte of each person's last conversation: alone, and after as many earlier ones as fit.

    Earlier conversations are "joined", without a mark between, or "opened", each with its opening token.
    """
    people: dict[str, list[Document]] = {}
    for document in self_dialogue(file):
        people.setdefault(document.person or "", []).append(document)
    result: dict[str, list[float]] = {"alone": [], "joined": [], "opened": []}
    for documents in people.values():
        *earlier, last = encode(tokenizer, documents)
        begin, own = last[:1], last[1:]
        room = MAX_POSITIONS - len(last)
        joined = [token for ids in earlier for token in ids[1:]][-room:]
        opened = [token for ids in earlier for token in ids][-room:]
        for case, before in (("alone", begin), ("joined", begin + joined), ("opened", opened + begin)):
            window = torch.tensor(before + own)[None]
            logits = model(window[:, :-1]).logits[0, -len(own) :].float()
            nats = float(torch.nn.functional.cross_entropy(logits, window[0, -len(own) :], reduction="sum"))
            result[case].append(nats / math.log(2) / documents[-1].text_bytes)
    return result


def replies(model: Any, tokenizer: Any, seed: int, **sampling: Any) -> Iterator[list[dict[str, str]]]:
    """Each conversation of `PROMPTS` with the model's answers; `sampling` overrides its defaults."""
    for number, prompts in enumerate(PROMPTS):
        messages: list[dict[str, str]] = []
        for turn, prompt in enumerate(prompts):
            messages.append({"role": "user", "content": prompt})
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            torch.manual_seed(seed + number * len(prompts) + turn)
            output = model.generate(**inputs, **sampling)[0, inputs["input_ids"].shape[1] :]
            text = tokenizer.decode(output, skip_special_tokens=True).strip()
            messages.append({"role": "assistant", "content": text})
        yield messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=path())
    parser.add_argument("--data", type=Path, help="folder of the corpora; without it only the replies")
    parser.add_argument("--people", type=Path, help="self-dialogue file of other people: does history help?")
    parser.add_argument("--replies", type=Path, help="write the replies here too, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.eval()
    raw = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    if options.people:
        cases = history_helps(model, raw, options.people)
        for case, values in cases.items():
            better = sum(a < b for a, b in zip(values, cases["alone"], strict=True))
            print(
                f"{case}: {sum(values) / len(values):.4f} bits per byte, lower for {better} of {len(values)}"
            )
    if options.data:
        for corpus in CORPORA:
            print(
                f"{corpus}: {bits_per_byte(model, raw, corpus, options.data):.4f} bits per byte", flush=True
            )
    named = ("temperature", "top_p", "repetition_penalty")
    sampling = {name: getattr(options, name) for name in named if getattr(options, name) is not None}
    conversations = list(replies(model, tokenizer, options.seed, **sampling))
    for messages in conversations:
        print("\n".join(f"{message['role']:>9}: {message['content']}" for message in messages) + "\n")
    if options.replies:
        options.replies.write_text(json.dumps(conversations, indent=1) + "\n")


if __name__ == "__main__":
    main()
