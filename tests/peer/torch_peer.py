# SPDX-License-Identifier: Apache-2.0
"""examples/torch against PyTorch and against our own C++ on the same weights.

The operator: outputs beside weights dequantized in float64, PyTorch's own checks of an operator, torch.compile. The
quantizer: nn.Linear to codes, with and without inputs. The
layer: state dicts, casts, copies. A model of transformers with its linear layers swapped, and a shared prefill:
greedy tokens as of our C++, which runs the same folder. Wrong calls and damaged files: errors that name what is wrong.
Where a GPU and a library with CUDA are there, the operator also runs on it, in a CUDA graph too. Exit code 4: a package,
the model or the library is missing; 1: a difference.
"""
import argparse
import copy
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile

os.environ["TQDM_DISABLE"] = "1"  # before transformers is imported
HERE = os.path.dirname(os.path.abspath(__file__))
EXAMPLES = os.path.join(HERE, "..", "..", "examples", "torch")
SKIPPED = 4
SEED = 29
BOUND = 1e-3
FORMATS = ("m1v4g128", "m2v8g64", "m3v4b4g-1", "m2v2b5g32", "m1v16g-1")
TOKENS = 20
PROMPTS = ("The capital of France is", "Water boils at a temperature of one hundred degrees, and it freezes at")
failed = []


def expect(condition, what):
    print(("ok      " if condition else "FAILED  ") + what, flush=True)
    if not condition:
        failed.append(what)


def expect_error(call, words, what):
    from codegemm_torch import CodeGemmError
    try:
        call()
    except CodeGemmError as error:
        missing = [word for word in words if word not in str(error)]
        expect(not missing, f"{what}: {error}" + (f" (no word of {missing})" if missing else ""))
    except Exception as error:  # noqa: BLE001  any other is a fault
        expect(False, f"{what}: {type(error).__name__}: {error}")
    else:
        expect(False, f"{what}: no error")


def random_matrix(name, rows, cols):
    import torch
    from codegemm_torch import Canonical, parse_format
    f = parse_format(name)
    shapes = Canonical.shapes(f, rows, cols)
    per_word = 4 if f.b <= 8 else 2
    codes = torch.randint(0, 2**f.b, (f.m, shapes[0][1], per_word, rows), dtype=torch.int64)
    words = sum(codes[:, :, i] << (32 // per_word * i) for i in range(per_word))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return Canonical(f, rows, cols, words, torch.randn(shapes[1]).half(), (0.05 + torch.rand(shapes[2])).half())


def layer_of(matrix, bias=False):
    import torch
    from codegemm_torch import CodeGemmLinear
    layer = CodeGemmLinear(matrix.format, matrix.cols, matrix.rows, bias=bias)
    for part in ("codes", "codebooks", "scales"):
        getattr(layer, part).copy_(getattr(matrix, part))
    if bias:
        torch.nn.init.normal_(layer.bias)
    return layer.requires_grad_(False)


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


def can_compile():
    """Whether torch.compile finds what it needs, for the CPU and for a GPU's launchers alike."""
    missing = [what for what, there in (("a C++ compiler", shutil.which(os.environ.get("CXX", "g++"))), (
        "Python.h", os.path.isfile(os.path.join(sysconfig.get_paths()["include"], "Python.h")))) if not there]
    if missing:
        print(f"        torch.compile: not run, there is no {', no '.join(missing)}")
    return not missing


def check_operator(device):
    import torch
    from codegemm_torch import PackedWeights, gemm, make_workspace
    types = (torch.float32, torch.float16, torch.bfloat16) if device == "cpu" else (torch.float16, torch.bfloat16)
    for name in FORMATS:
        matrix = random_matrix(name, 176, 512)
        packed = PackedWeights([matrix], device)
        workspace = make_workspace([packed])
        weights = matrix.dequantize()
        for dtype, tokens in itertools.product(types, (1, 3, 40, 700)):
            x = torch.randn(tokens, 512 + 8)[:, :512].to(dtype).to(device)  # rows with a stride of their own
            y = gemm(x, packed.handle, 176, workspace)
            off = relative(y.cpu(), x.cpu().double() @ weights.T)
            bound = {torch.float32: BOUND, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
            if y.dtype != dtype or y.shape != (tokens, 176) or not off < bound:
                expect(False, f"{device} {name} {dtype}, {tokens} tokens: {off:.1e} off")
        empty = gemm(torch.empty(2, 0, 512, device=device, dtype=types[0]), packed.handle, 176, workspace)
        x = torch.randn(512, 6, dtype=types[0], device=device)
        turned = torch.equal(gemm(x.T, packed.handle, 176, workspace), gemm(x.T.contiguous(), packed.handle, 176, workspace))
        once = torch.equal(gemm(x.T[:1].expand(6, 512), packed.handle, 176, workspace),
                           gemm(x.T[:1].repeat(6, 1), packed.handle, 176, workspace))
        expect(turned and once, f"{device} {name}: x transposed or expanded, the same bits")
        expect(empty.shape == (2, 0, 176), f"{device} {name}: products, last of them {off:.1e} off, and none of 0 tokens")
    x, y = torch.randn(5, 512, dtype=types[0], device=device), torch.empty(5, 176, dtype=types[0], device=device)
    results = torch.library.opcheck(torch.ops.codegemm.gemm.default, (x, y, workspace, packed.handle))
    expect(set(results.values()) == {"SUCCESS"}, f"{device}: torch.library.opcheck: {len(results)} tests")
    return packed, workspace


def check_wrong_calls(packed, workspace):
    import torch
    from codegemm_torch import PackedWeights, gemm, parse_format
    from codegemm_torch.library import Library
    op, x, y = torch.ops.codegemm.gemm, torch.randn(5, 512), torch.full((5, 176), 7.0)
    expect_error(lambda: op(x[:, :-1], y, workspace, packed.handle), ["511", "512"], "another K")
    expect_error(lambda: op(x, y[:4], workspace, packed.handle), ["5 tokens", "4"], "another number of tokens")
    expect_error(lambda: op(x.T.contiguous().T, y, workspace, packed.handle), ["stride"], "columns apart")
    expect_error(lambda: op(x.half(), y, workspace, packed.handle), ["float16", "float32"], "fp16 on the CPU")
    expect_error(lambda: op(x, y, workspace[:100], packed.handle), ["workspace"], "a small workspace")
    expect_error(lambda: op(x, y, workspace.float(), packed.handle), ["workspace"], "a workspace of floats")
    expect_error(lambda: op(x, y, workspace, 10**9), ["handle", str(10**9)], "a handle of nothing")
    expect(bool((y == 7.0).all()), "y is as it was after all these")
    expect_error(lambda: gemm(x.requires_grad_(), packed.handle, 176, workspace), ["gradient"], "a gradient")
    expect_error(lambda: Library("no/such/library.so"), ["no/such/library.so"], "no library")
    expect_error(lambda: Library("libm.so.6"), ["libm.so.6", "codegemm_c_abi_version"], "another library")
    expect_error(lambda: parse_format("m2v3g64"), ["v"], "a format that cannot be")
    matrix = random_matrix("m2v2b5g32", 48, 64)
    matrix.codes[1, 3, 7] |= 0x3F000000
    expect_error(lambda: PackedWeights([matrix], "cpu"), ["code"], "a code of 63 among 32 centroids")
    expect_error(lambda: PackedWeights([matrix, matrix], "cpu"), ["GPU"], "merged on the CPU")
    gone = PackedWeights([random_matrix("m1v4g128", 16, 128)], "cpu")
    handle = gone.handle
    del gone
    expect_error(lambda: op(x, y, workspace, handle), [f"handle {handle}"], "a handle of freed weights")


def check_quantize():
    import torch
    from codegemm_torch import CodeGemmLinear, Format, gram_of, parse_format, prepare, quantize
    linear, x = torch.nn.Linear(128, 96), torch.randn(3, 5, 128)
    layer = CodeGemmLinear.from_linear(linear, "m2v4b6g64")
    model = prepare(torch.nn.Sequential(layer))
    with torch.no_grad():
        y, dense = model(x), linear(x)
        of_codes = x.double() @ layer.canonical().dequantize().T + layer.bias.double()
    expect(relative(y, of_codes) < BOUND, f"from_linear: the product of its codes ({relative(y, of_codes):.1e} off)")
    off = relative(y, dense.double())
    expect(0 < off < 0.3, f"from_linear: {off:.3f} from the dense layer at 3 bits")
    layer.canonical().check("from_linear")

    def same(a, b):
        return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("codes", "codebooks", "scales"))
    weight, threads = linear.weight, torch.get_num_threads()
    matrix = quantize(weight, "m2v4b6g64")
    torch.set_num_threads(1 if threads > 1 else 3)
    again = quantize(weight.detach().T.contiguous().T, parse_format("m2v4b6g64"))
    torch.set_num_threads(threads)
    expect(same(matrix, again), "quantize: the same bits on other threads, and of a transposed tensor")
    expect(not same(matrix, quantize(weight, "m2v4b6g64", seed=2)), "quantize: another seed, other bits")
    expect(same(quantize(weight.half().float(), "m1v4g128"), quantize(weight.half(), "m1v4g128")), "quantize: fp16")

    # Inputs that lie in a few directions: what is wrong beside these does not count.
    inputs = (torch.randn(400, 12) @ torch.randn(12, 128) + 0.1 * torch.randn(400, 128)).view(4, 100, 128)
    want = inputs.double() @ weight.detach().double().T
    plain, told = (relative(inputs.double() @ quantize(weight, "m1v4b6g64", given).dequantize().T, want)
                   for given in (None, inputs))
    expect(told < 0.6 * plain, f"quantize: outputs are off by {told:.3f} calibrated on their inputs, {plain:.3f} without")
    expect(same(quantize(weight, "m1v4b6g64", inputs), quantize(weight, "m1v4b6g64", gram=gram_of(inputs, 128))),
           "quantize: the gram of the inputs in their place")

    bad = weight.detach().clone()
    bad[3, 7] = float("nan")
    expect_error(lambda: quantize(bad, "m1v4g128"), ["row 3", "column 7", "nan"], "a weight that is not a number")
    expect_error(lambda: quantize(bad[:, :126], "m1v4g128"), ["126", "v = 4"], "a K that is no multiple of v")
    expect_error(lambda: quantize(weight[0], "m1v4g128"), ["(128,)"], "a vector")
    expect_error(lambda: quantize(weight, "m1v3g128"), ["v"], "a format that cannot be")
    expect_error(lambda: quantize(weight, Format(4, 9, 8, 128)), ["m = 9"], "nine codebooks")
    expect_error(lambda: quantize(weight, "m1v4g128", x[..., :5]), ["5)", "128"], "inputs of another K")
    expect_error(lambda: quantize(weight, "m1v4g128", x, gram_of(x, 128)), ["inputs", "gram"], "both")
    expect_error(lambda: quantize(weight, "m1v4g128", gram=torch.eye(64)), ["(64, 64)", "128"], "another gram")
    expect_error(lambda: quantize(weight, "m1v4g128", x * float("inf")), ["H at row 0"], "inputs without an end")
    expect_error(lambda: quantize(weight, "m1v4g128", steps=3), ["steps", "seed"], "an option that there is not")
    expect_error(lambda: quantize(weight, "m1v4g128", iterations=-1), ["iterations = -1"], "an option below 0")
    expect_error(lambda: quantize(torch.empty(0, 128), "m1v4g128"), ["0 x 128"], "no rows")


def check_layer(scratch):
    import torch
    from codegemm_torch import CodeGemmLinear, prepare
    matrix = random_matrix("m2v8g64", 96, 256)
    layer, x = layer_of(matrix, bias=True), torch.randn(2, 7, 256)
    model = torch.nn.Sequential(layer, torch.nn.ReLU(), layer_of(random_matrix("m1v4g-1", 64, 96)))
    expect_error(lambda: model(x), ["prepare"], "a layer that is not prepared")
    prepare(model)
    want = x.double() @ matrix.dequantize().T + layer.bias.double()
    expect(relative(layer(x), want) < BOUND, "CodeGemmLinear with a bias, x of three dimensions")
    expect(model[0].workspace is model[2].workspace, "one workspace for the model")
    y = model(x)

    path = os.path.join(scratch, "state.pt")
    torch.save(model.state_dict(), path)
    twin = torch.nn.Sequential(CodeGemmLinear(matrix.format, 256, 96, bias=True), torch.nn.ReLU(),
                               CodeGemmLinear(model[2].format, 96, 64))
    state = torch.load(path)
    expect(sorted(state) == sorted(["0.bias"] + [f"{i}.{p}" for i in (0, 2) for p in ("codes", "codebooks", "scales")]),
           "a state dict has the canonical arrays and nothing else")
    twin.load_state_dict(state)
    expect(torch.equal(prepare(twin)(x), y), "saved and loaded, the same bits")
    expect(torch.equal(prepare(copy.deepcopy(model))(x), y), "deep copy, the same bits")
    model.to(torch.bfloat16).to(torch.float32)
    expect(model[0].codebooks.dtype == torch.float16 and torch.equal(model[0].codebooks, matrix.codebooks),
           "casts leave codebooks as they are")
    expect(model[0](x.bfloat16()).dtype == torch.bfloat16, "bfloat16 in, bfloat16 out")
    expect_error(lambda: CodeGemmLinear(matrix.format, 250, 96), ["250"], "K that is no multiple of v")

    if not can_compile():
        return
    twin.eval()
    run = torch.compile(lambda x: torch.tanh(twin(x)) * 2, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        same = all(torch.allclose(run(v), torch.tanh(twin(v)) * 2, rtol=1e-5, atol=1e-5)
                   for v in (x, torch.randn(1, 256), torch.randn(3, 5, 256)))
    expect(same, "torch.compile, one graph for three shapes")


def check_cuda():
    import torch
    from codegemm_torch import load_library, prepare
    if not torch.cuda.is_available() or not load_library().has_cuda:
        print("        no GPU, or a library without CUDA: not run there")
        return
    check_operator("cuda")
    model = torch.nn.Sequential(layer_of(random_matrix("m2v8g64", 512, 256)), torch.nn.ReLU(),
                                layer_of(random_matrix("m1v4g128", 256, 512))).cuda()
    expect_error(lambda: model(torch.randn(1, 256).cuda().half()), ["prepare"], "moved, and not prepared")
    prepare(model)
    for tokens in (1, 16, 200):
        x = torch.randn(tokens, 256, device="cuda").half()
        with torch.inference_mode():
            want = model(x)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                model(x)
            torch.cuda.current_stream().wait_stream(stream)
            graph, at = torch.cuda.CUDAGraph(), torch.empty_like(x)
            with torch.cuda.graph(graph):
                out = model(at)
            at.copy_(x)
            graph.replay()
            expect(torch.equal(out, want), f"cuda: in a CUDA graph the same bits, {tokens} tokens")
            if not can_compile():
                continue
            run = torch.compile(model, mode="reduce-overhead", fullgraph=True)
            same = all(torch.allclose(run(x).clone(), want, rtol=1e-3, atol=1e-3) for _ in range(4))
            expect(same, f"cuda: torch.compile with its own graphs, {tokens} tokens")


def greedy(model, ids, count, cache=None):
    """Tokens, and the two best logits of each; the last id is the first that is run where there is a cache."""
    import torch
    from transformers import DynamicCache
    cache = DynamicCache(config=model.config) if cache is None else cache
    ids, tokens, best = list(ids[cache.get_seq_length() :]), [], []
    with torch.no_grad():
        while len(tokens) < count:
            logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
            best.append(logits.topk(2).values.tolist())
            tokens.append(int(logits.argmax()))
            ids = tokens[-1:]
    return tokens, best


def same_tokens(ours, tokens, best, what):
    """Equal up to the first place where the two best logits are closer than what fp32 kernels differ by."""
    at = next((i for i, pair in enumerate(zip(ours, tokens)) if pair[0] != pair[1]), None)
    tie = at is not None and best[at][0] - best[at][1] <= BOUND * abs(best[at][0])
    expect(len(ours) == len(tokens) and (at is None or tie),
           f"{what}: {len(tokens)} tokens as of our C++" + (f" but for a tie at {at}" if tie else ""))


def check_sharing():
    """Sessions of small random models: what a module reads, what stays as it is, and what does not fit."""
    import torch
    from codegemm_torch.shared_prefill import SharedSession
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3)
    base, one, two = (LlamaForCausalLM(copy.deepcopy(config)).eval() for _ in range(3))
    prompt = torch.randint(0, 96, (700,)).tolist()

    def by_definition(module, context):
        cache = DynamicCache(config=config)
        with torch.no_grad():
            base(torch.tensor([context[:-1]]), past_key_values=cache)
        return greedy(module, context, 16, cache)[0]

    session = SharedSession(base)
    session.append(prompt)
    wanted = [by_definition(module, prompt) for module in (one, two)]
    expect(session.prefill() == 699 and session.prefill() == 0, "the base prefills all but the last token, once")
    before = [(layer.keys.clone(), layer.values.clone()) for layer in session.cache.layers]
    expect(session.decode(one, 16) == wanted[0], "a module's tokens as by the definition")
    expect(session.decode(two, 16) == wanted[1] and wanted[0] != wanted[1], "another module's, on the same cache")
    forks = [session.fork(), session.fork()]
    tokens = [[], []]
    with torch.no_grad():
        for step in range(16):  # in turns, a token each
            for i, module in enumerate((one, two)):
                last = tokens[i][-1] if step else prompt[-1]
                logits = module(torch.tensor([[last]]), past_key_values=forks[i], use_cache=True).logits
                tokens[i].append(int(logits[0, -1].argmax()))
    expect(tokens == wanted, "both at once, a token each in turn")
    places = [[layer.base_keys.data_ptr() for layer in fork.layers] for fork in forks]
    expect(places[0] == places[1] == [layer.keys.data_ptr() for layer in session.cache.layers],
           "both read the base's keys where they lie")
    expect(all(torch.equal(layer.keys, k) and torch.equal(layer.values, v)
               for layer, (k, v) in zip(session.cache.layers, before)), "the base's cache is as it was")
    session.append(wanted[0])
    context = prompt + wanted[0]
    expect(session.prefill() == 16, "an answer: the base prefills just that")
    expect(session.decode(two, 16) == by_definition(two, context), "the next module's tokens as by the definition")
    expect(session.decode(base, 16) == greedy(base, context, 16)[0], "the base as its own module: as without sharing")
    stop = wanted[0][5]
    short = SharedSession(base)
    short.append(prompt)
    expect(short.decode(one, 16, stop=[stop]) == wanted[0][: wanted[0].index(stop)], "a stop token ends it")

    other = copy.deepcopy(config)
    other.num_hidden_layers, other.vocab_size = 2, 97
    misfit = LlamaForCausalLM(other)
    expect_error(lambda: session.decode(misfit, 1), ["layers 2", "vocabulary 97"], "a module of another shape")
    expect_error(SharedSession(base).prefill, ["empty"], "an empty context")
    with torch.no_grad():
        expect_error(lambda: one(torch.tensor([[1, 2]]), past_key_values=session.fork()), ["one token"],
                     "two tokens at once")


def check_damaged(folder, scratch):
    from codegemm_torch import load_quantized, read_config
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    where = os.path.join(scratch, "damaged")
    os.makedirs(where)

    def described(change):
        changed = copy.deepcopy(config)
        change(changed)
        with open(os.path.join(where, "config.json"), "w", encoding="utf-8") as file:
            json.dump(changed, file)
        return lambda: read_config(where)

    expect_error(lambda: read_config(os.path.join(scratch, "nowhere")), ["nowhere"], "no folder")
    expect_error(described(lambda c: c.pop("codegemm")), ["codegemm"], "a model that is not quantized")
    for field, value in (("vec_len", "4"), ("num_codebooks", -1), ("nbits_per_codebook", 12), ("group_size", None)):
        expect_error(described(lambda c: c["codegemm"].update({field: value})), [field], f"{field} {value!r}")

    described(lambda c: None)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tensors = load_file(os.path.join(folder, "model.safetensors"))
    layer = "model.layers.1.mlp.down_proj"
    load_quantized(model, folder)  # as it is, it fits

    def saved(change):
        changed = dict(tensors)
        change(changed)
        save_file(changed, os.path.join(where, "model.safetensors"))
        return lambda: load_quantized(model, where)

    expect_error(saved(lambda t: t.pop(layer + ".scales")), [layer, "scales"], "a layer without scales")
    expect_error(saved(lambda t: t.update({layer + ".codes": t[layer + ".codes"][:, :-1].clone()})), [layer, "codes"],
                 "a layer of too few codes")
    expect_error(saved(lambda t: t.update({layer + ".codes": t[layer + ".codes"] | 0xF0})), [layer, "code"],
                 "codes without centroids")
    expect_error(saved(lambda t: t.update({layer + ".codebooks": t[layer + ".codebooks"] / 0})), [layer], "infinite codebooks")
    expect_error(saved(lambda t: t.pop("model.norm.weight")), ["model.norm.weight"], "a model without its last norm")
    expect_error(saved(lambda t: t.update({"model.extra": t["model.norm.weight"].clone()})), ["model.extra"], "a tensor too many")
    with open(os.path.join(where, "model.safetensors"), "r+b") as file:
        file.truncate(1000)
    expect_error(lambda: load_quantized(model, where), [where], "a file that ends early")


def small_model(tool, vocabulary, scratch):
    """A random model's folder, and its quantized twin's."""
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
                         tie_word_embeddings=True)
    dense, quantized = os.path.join(scratch, "small"), os.path.join(scratch, "small-quantized")
    LlamaForCausalLM(config).half().save_pretrained(dense)
    subprocess.run([tool, "quantize", dense, quantized, "m2v4b4g32"], check=True)
    return dense, quantized


def check_programs(model, folder, tokenizer, scratch):
    """The example's programs, as a user starts them."""
    document = os.path.join(HERE, "..", "data", "short_document.txt")
    results = os.path.join(scratch, "bench.json")
    for program, arguments in (
            ("generate.py", [folder, "--tokenizer", tokenizer, "--max-tokens", "5"]),
            ("shared_prefill.py", [model, folder, model, "--tokenizer", tokenizer, "--document", document, "--question",
                                   "What is this about?", "--question", "And who is in it?", "--max-tokens", "5"]),
            ("bench.py", ["--device", "cpu", "--model", folder, "--steps", "2", "--rounds", "1", "--json", results])):
        run = subprocess.run([sys.executable, os.path.join(EXAMPLES, program), *arguments], capture_output=True,
                             text=True, check=False)
        expect(run.returncode == 0 and run.stdout.strip() != "", f"{program}: ends with {run.returncode}")
        if run.returncode != 0:
            print(run.stderr[-2000:])
    with open(results, encoding="utf-8") as file:
        rows = {row["linear"]: row["tokens_per_s"] for row in json.load(file)["rows"]}
    expect(rows["nn.Linear fp32"] > 0 and rows["codegemm"] > 0, "bench.py: tokens a second of both")
    run = subprocess.run([sys.executable, os.path.join(EXAMPLES, "generate.py"), scratch], capture_output=True, text=True,
                         check=False)
    expect(run.returncode == 1 and run.stderr.startswith("generate.py: "), f"generate.py: {run.stderr.strip()[-200:]}")


def check_torch_alone(scratch):
    import torch
    torch.manual_seed(SEED)
    packed, workspace = check_operator("cpu")
    check_wrong_calls(packed, workspace)
    check_quantize()
    check_layer(scratch)
    check_cuda()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", help="the program torch_tool")
    parser.add_argument("--model", help="a GGUF file")
    parser.add_argument("--operator-only", action="store_true",
                        help="the operator and the layer: needs PyTorch and CODEGEMM_C_LIBRARY alone")
    args = parser.parse_args()
    if not args.operator_only and not (args.tool and args.model):
        parser.error("--tool and --model, or --operator-only")
    sys.path.insert(0, EXAMPLES)
    if not args.operator_only and not os.path.isfile(args.model):
        print(f"SKIPPED: no model at '{args.model}'")
        return SKIPPED
    if not os.path.isfile(os.environ.get("CODEGEMM_C_LIBRARY", "")):
        print("SKIPPED: CODEGEMM_C_LIBRARY names no library (CODEGEMM_BUILD_CAPI)")
        return SKIPPED
    if args.operator_only:
        if importlib.util.find_spec("torch") is None:
            print("SKIPPED: no PyTorch")
            return SKIPPED
        with tempfile.TemporaryDirectory() as scratch:
            check_torch_alone(scratch)
        return 1 if failed else 0
    try:
        import accelerate  # noqa: F401  transformers needs it to read a GGUF
        import safetensors  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        print(f"SKIPPED: {error}")
        return SKIPPED
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    from codegemm_torch import codegemm_layers, quantized_model
    from codegemm_torch.shared_prefill import SharedSession
    with tempfile.TemporaryDirectory() as scratch:
        check_torch_alone(scratch)
        check_sharing()

        # ---- A model whose layers are swapped, beside our C++.
        folder = os.path.join(scratch, "quantized")
        subprocess.run([args.tool, "quantize", args.model, folder, "m2v2b4g64"], check=True)
        home, name = os.path.split(os.path.abspath(args.model))
        tokenizer = AutoTokenizer.from_pretrained(home, gguf_file=name)
        prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
        with open(os.path.join(scratch, "ids.json"), "w", encoding="utf-8") as file:
            json.dump(prompts, file)
        subprocess.run([args.tool, "generate", args.model, folder, os.path.join(scratch, "ids.json"), str(TOKENS),
                        os.path.join(scratch, "tokens.json")], check=True)
        with open(os.path.join(scratch, "tokens.json"), encoding="utf-8") as file:
            ours = json.load(file)
        base = AutoModelForCausalLM.from_pretrained(home, gguf_file=name, dtype=torch.float32).eval()
        swapped = quantized_model(folder)
        count = len(codegemm_layers(swapped))
        expect(count == 7 * swapped.config.num_hidden_layers, f"{count} layers are swapped")
        for ids, wanted in zip(prompts, ours):
            tokens, best = greedy(swapped, ids, TOKENS)
            print(f"        {tokenizer.decode(ids)} ->{tokenizer.decode(tokens)}")
            same_tokens(wanted["own"], tokens, best, "the swapped model")
            made = swapped.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8, min_new_tokens=8)
            expect(made[0, len(ids) :].tolist() == tokens[:8], "generate() gives the same")
            session = SharedSession(base)
            session.append(ids)
            seen = []

            def choose(logits):
                seen.append(logits.topk(2).values.tolist())
                return logits.argmax()

            tokens = session.decode(swapped, TOKENS, choose=choose)
            same_tokens(wanted["shared"], tokens, seen, "the swapped model from the base's cache")
            swapped.set_attn_implementation("sdpa")
        del base, swapped, session

        small, small_quantized = small_model(args.tool, len(tokenizer), scratch)
        check_damaged(small_quantized, scratch)
        check_programs(small, small_quantized, args.model, scratch)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
