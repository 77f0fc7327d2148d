# SPDX-License-Identifier: Apache-2.0
#
# compact_trace.py TRACE.jsonl > TRACE.tsv: a Mooncake trace (FAST'25) with its block ids folded. Refuses a trace
# where an id does not name a prefix, or new ids are not counted up, since the short form could not hold it.
import json
import sys

print("# SPDX-License-Identifier: Apache-2.0")
print("# The Mooncake project's conversation trace, folded by bench/data/compact_trace.py; see bench/data/README.md.")
print("# timestamp_ms\tinput_tokens\toutput_tokens\tlast_shared_block\tnew_blocks")
parent = {}
for line in open(sys.argv[1]):
    request = json.loads(line)
    last, new = -1, 0
    before = -1
    for block in request["hash_ids"]:
        if block in parent:
            if parent[block] != before or new:
                sys.exit(f"block {block} has two parents")
            last = block
        else:
            if block != len(parent):
                sys.exit(f"block {block} is not the next new one")
            parent[block] = before
            new += 1
        before = block
    print(request["timestamp"], request["input_length"], request["output_length"], last, new, sep="\t")
