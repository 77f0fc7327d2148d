# SPDX-License-Identifier: Apache-2.0
"""What the products of one token do to the card, ours and each peer's: a table from ncu's counters and NVML's energy.

usage: gpu_profile.py PROGRAM [--json FILE] [--shape NxK]... [--peer NAME=LIBRARY[:FORMAT,...]]...

PROGRAM is the built suite codegemm-gpu. A peer's formats are those it is compared at (default: the paper's). cuBLAS is
always among the peers. Needs ncu on the PATH. Counters are read with cold caches and the clocks as they are.
"""
import argparse
import csv
import io
import json
import subprocess
import sys
import tempfile

PAPER_FORMATS = ["m1v4g128", "m2v8g128"]
SHAPES = ["4096x4096", "28672x8192"]
# What a column is called here, ncu's name for it, and what the number is multiplied by.
METRICS = {
    "us": ("gpu__time_duration.sum", 1e-3),
    "dram_percent": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "l2_percent": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "dram_mb": ("dram__bytes_read.sum", 1e-6),
    "shared_wavefronts": ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum", 1),
    "bank_conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", 1),
    "issue_percent": ("smsp__issue_active.avg.pct_of_peak_sustained_active", 1),
    "occupancy_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active", 1),
}
OURS = ("gather_kernel", "fused_mma_kernel", "fused_wgmma_kernel")
HELPERS = ("dequantize_kernel",)


def problem_arguments(formats, shapes):
    out = ["--tokens", "1"]
    for shape in shapes:
        out += ["--shape", shape]
    for name in formats:
        out += ["--format", name]
    return out


def counters(program, formats, shapes, peer_arguments):
    """[(kernel name, {column: number})] in the order of the launches."""
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none",
               "--metrics", ",".join(name for name, _ in METRICS.values()),
               program, "--once", *problem_arguments(formats, shapes), *peer_arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"gpu_profile.py: {' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    out = []
    for row in rows[1:]:  # the first one holds the units
        values = {column: float(row[name].replace(",", "")) * factor for column, (name, factor) in METRICS.items()}
        out.append((row["Kernel Name"], values))
    return out


def by_problem(kernels, formats, shapes):
    """[(format, shape, ours, the peer's longest kernel or None)]: each product of ours begins a problem."""
    problems = [(f, s) for f in formats for s in shapes]
    out = []
    for name, values in kernels:
        if any(k in name for k in OURS):
            if len(out) == len(problems):
                sys.exit("gpu_profile.py: more products than problems")
            out.append([*problems[len(out)], values, None])
        elif out and not any(k in name for k in HELPERS):
            if out[-1][3] is None or values["us"] > out[-1][3]["us"]:
                out[-1][3] = values
    if len(out) != len(problems):
        sys.exit(f"gpu_profile.py: ncu saw {len(out)} products, expected {len(problems)}")
    return out


def energies(program, formats, shapes, peer_arguments):
    """{(format, shape): the suite's row}"""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run([program, "--quick", "--energy", "--json", file.name, *problem_arguments(formats, shapes),
                        *peer_arguments], check=True, stdout=subprocess.DEVNULL)
        suite = json.load(open(file.name, encoding="utf-8"))
    return suite, {(row["config"], row["shape"]): row for row in suite["rows"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("--json")
    parser.add_argument("--shape", action="append")
    parser.add_argument("--peer", action="append", default=[])
    options = parser.parse_args()
    shapes = options.shape or SHAPES

    runs = [("cublas", PAPER_FORMATS[:1], [])]
    for peer in options.peer:
        name, _, rest = peer.partition("=")
        library, _, formats = rest.partition(":")
        runs.append((name, formats.split(",") if formats else PAPER_FORMATS,
                     ["--no-cublas", "--peer", f"{name}={library}"]))
    rows = []
    suite = {}
    for peer, formats, arguments in runs:
        suite, measured = energies(options.program, formats, shapes, arguments)
        for config, shape, ours, theirs in by_problem(counters(options.program, formats, shapes, arguments), formats,
                                                      shapes):
            row = measured[(config, shape)]
            if not any((r["config"], r["shape"]) == (config, shape) for r in rows):  # not yet beside another peer
                rows.append({"shape": shape, "config": config, "product": "codegemm", "median_us": row["median_us"],
                             "microjoules": row["microjoules"], "watts": row["watts"], **ours})
            for other in row["peers"]:
                if other["name"] == peer and theirs is not None:
                    rows.append({"shape": shape, "config": config, "product": peer, "median_us": other["median_us"],
                                 "microjoules": other["microjoules"], "watts": other["watts"], **theirs})
    columns = ["us", "dram_percent", "l2_percent", "issue_percent", "occupancy_percent"]
    print(f"{'shape':12} {'format':12} {'product':10} {'graph us':>8} {'uJ':>7} {'watts':>6} {'ncu us':>7} {'DRAM%':>6}"
          f" {'L2%':>6} {'issue%':>6} {'warps%':>6} {'DRAM MB':>8} {'conflicts/wavefront':>19}")
    for r in rows:
        conflicts = r["bank_conflicts"] / max(r["shared_wavefronts"], 1)
        print(f"{r['shape']:12} {r['config']:12} {r['product']:10} {r['median_us']:8.2f} {r['microjoules']:7.0f}"
              f" {r['watts']:6.0f} " + " ".join(f"{r[c]:6.1f}" for c in columns) +
              f" {r['dram_mb']:8.1f} {conflicts:19.3f}")
    if options.json:
        head = {k: v for k, v in suite.items() if k != "rows"}
        head["suite"] = "codegemm-gpu-profile"
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**head, "rows": rows}, file, indent=2)
            file.write("\n")


main()
