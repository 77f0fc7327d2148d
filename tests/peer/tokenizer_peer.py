#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compares this repository's tokenizers and chat templates with Hugging Face's and Jinja2's.

    python3 tests/peer/tokenizer_peer.py --tool BUILD/tokenizer_tool --model MODEL.gguf [--lines FILE]

--tool    the program built from tests/peer/tokenizer_tool.cpp
--model   a GGUF file with a byte-level BPE tokenizer; else the environment's PREFILLSHARE_TEST_MODEL
--lines   the text, one case a line; else tests/data/varied_lines.txt

Exit code: 0 all equal; 1 something differs (the first five differences are shown); 4 skipped: a package or the model
is missing.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

SKIP = 4
LLAMA3_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_REGEX = LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")


def skip(reason):
    print(f"SKIPPED: {reason}")
    sys.exit(SKIP)


def read_metadata(path):
    import gguf

    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}


def pre_tokenizer(name):
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name == "gpt-2":
        return byte_level
    regex = {"llama-bpe": LLAMA3_REGEX, "qwen2": QWEN2_REGEX}[name]
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), behavior="isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level_tokenizer(metadata, pre):
    """What SmolLM2's tokenizer.json describes, from the vocabulary in the GGUF file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def sentencepiece_tokenizer(texts):
    """A small BPE with byte fallback, trained here, as Llama 2's tokenizer.json is built."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, show_progress=False, limit_alphabet=300)
    tokenizer.train_from_iterator(texts, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def write_sentencepiece_gguf(path, tokenizer):
    """The same vocabulary as llama.cpp's converter writes it: a merged token's score is minus its rank."""
    import gguf

    data = json.loads(tokenizer.to_str())["model"]
    tokens = [t for t, _ in sorted(data["vocab"].items(), key=lambda item: item[1])]
    scores, types = [0.0] * len(tokens), [gguf.TokenType.NORMAL] * len(tokens)
    for i, token in enumerate(tokens):
        if token in ("<s>", "</s>"):
            types[i] = gguf.TokenType.CONTROL
        elif token == "<unk>":
            types[i] = gguf.TokenType.UNKNOWN
        elif len(token) == 6 and token.startswith("<0x"):
            types[i] = gguf.TokenType.BYTE
        else:
            scores[i] = -1e6  # a single character: never the result of a join
    for rank, merge in enumerate(data["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores[data["vocab"][left + right]] = -float(rank)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_tool(tool, *arguments):
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, check=False)
    if done.returncode != 0:
        print(done.stderr.decode(errors="replace"))
        sys.exit(1)
    return done.stdout.decode("utf-8")


class Report:
    def __init__(self):
        self.bad = 0

    def compare(self, title, texts, ours, theirs):
        different = [i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b]
        if len(ours) != len(theirs):
            print(f"{title}: {len(ours)} results, expected {len(theirs)}")
            self.bad += 1
        self.bad += len(different)
        print(f"{title}: {len(theirs) - len(different)} of {len(theirs)} equal")
        for i in different[:5]:
            print(f"  case {i + 1}: {texts[i]!r}\n    here: {ours[i]}\n    peer: {theirs[i]}")


def conversations():
    user = {"role": "user", "content": "  What is\n\n3 + 4?  "}
    answer = {"role": "assistant", "content": "It is 7."}
    system = {"role": "system", "content": "Be brief."}
    other = {"role": "user", "content": "Größe? 日本 🙂 <|im_end|>"}
    for messages in ([user], [system, user], [user, answer, other], [system, user, answer, other]):
        for prompt in (True, False):
            yield {"messages": messages, "add_generation_prompt": prompt}


def compare_chat(report, tool, model, metadata, folder):
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(metadata["tokenizer.chat_template"])
    tokens = metadata["tokenizer.ggml.tokens"]
    special = {"bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
               "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]], "tools": None, "documents": None}
    ours, theirs, cases = [], [], list(conversations())
    for case in cases:
        path = folder / "chat.json"
        path.write_text(json.dumps(case), encoding="utf-8")
        ours.append(json.loads(run_tool(tool, model, "--chat", path)))
        theirs.append(template.render(**case, **special))
    report.compare(f"chat template, Jinja2 {jinja2.__version__}", cases, ours, theirs)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", required=True)
    parser.add_argument("--model", default=os.environ.get("PREFILLSHARE_TEST_MODEL"))
    parser.add_argument("--lines", default=pathlib.Path(__file__).parent.parent / "data" / "varied_lines.txt")
    options = parser.parse_args()
    try:
        import gguf  # noqa: F401
        import jinja2  # noqa: F401
        import tokenizers
    except ImportError as missing:
        skip(f"Python package {missing.name} is not installed")
    if not options.model or not pathlib.Path(options.model).is_file():
        skip("no model: give --model or set PREFILLSHARE_TEST_MODEL")

    report = Report()
    data = pathlib.Path(options.lines).read_bytes()
    lines = data.decode("utf-8").removesuffix("\n").split("\n")
    metadata = read_metadata(options.model)
    print(f"tokenizers {tokenizers.__version__}, {len(lines)} lines, pre-tokenizer {metadata['tokenizer.ggml.pre']}")

    def ours(model, *flags):
        return [json.loads(line) for line in run_tool(options.tool, model, options.lines, *flags).splitlines()]

    peer = byte_level_tokenizer(metadata, metadata["tokenizer.ggml.pre"])
    theirs = [peer.encode(line, add_special_tokens=False).ids for line in lines]
    report.compare("the model's GGUF against tokenizers", lines, ours(options.model), theirs)

    try:
        from transformers import AutoTokenizer, __version__ as version
        path = pathlib.Path(options.model)
        auto = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        # Its conversion forgets SmolLM2's digit splitting: it always takes the plain ByteLevel pre-tokenizer.
        auto.backend_tokenizer.pre_tokenizer = pre_tokenizer(metadata["tokenizer.ggml.pre"])
        report.compare(f"the model's GGUF against transformers {version}", lines, ours(options.model),
                       [auto.encode(line, add_special_tokens=False) for line in lines])
    except Exception as failure:  # the conversion is not for every model and version
        print(f"transformers' AutoTokenizer left out: {type(failure).__name__}: {failure}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        compare_chat(report, options.tool, options.model, metadata, folder)
        for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
            peer = byte_level_tokenizer(metadata, pre)
            peer.model.ignore_merges = pre == "llama-bpe"
            (folder / pre).mkdir()
            peer.save(str(folder / pre / "tokenizer.json"))
            theirs = [peer.encode(line, add_special_tokens=False).ids for line in lines]
            report.compare(f"tokenizer.json, {pre}", lines, ours(folder / pre), theirs)
        peer = sentencepiece_tokenizer(lines)
        write_sentencepiece_gguf(folder / "llama.gguf", peer)
        plain = [line for line in lines if line and "<s>" not in line and "<unk>" not in line]
        (folder / "plain.txt").write_bytes("".join(line + "\n" for line in plain).encode("utf-8"))
        options.lines = folder / "plain.txt"
        theirs = [peer.encode(line, add_special_tokens=False).ids for line in plain]
        report.compare("GGUF of the kind \"llama\"", plain, ours(folder / "llama.gguf"), theirs)
    print("all equal" if report.bad == 0 else f"{report.bad} differences")
    return 0 if report.bad == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
