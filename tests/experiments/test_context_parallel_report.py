"""What the report on context parallelism says of a case that is small enough to count by hand."""

import json


def test_bytes_and_work_are_those_counted_by_hand(script, tmp_path):
    """64 tokens over two devices, chunks of 8, 2 key-value heads of 32 numbers."""
    path = tmp_path / "report.json"
    sizes = ["--devices", "2", "--length", "64", "--block", "8", "--set", "text.attention.chunk_size=8", "--draws", "1"]
    process = script("context_parallel", *sizes, "--json", str(path))
    report = json.loads(path.read_text())
    key, tag = 2 * 2 * 32 * 4, 2 * 4  # bytes of a token's key and value, and of its position and segment

    assert report["chunked contiguous aligned"] == {"forward": 0, "training": 0, "work_most": 4, "work_mean": 4.0}
    assert report["chunked contiguous anywhere"]["forward"] == 7 * (key + tag)
    assert report["chunked contiguous anywhere"]["training"] == 7 * (2 * key + tag)
    # Of four pieces 0 goes to the second device, for piece 1, and 2 to the first, for 3; piece 2 has piece 1 beside it.
    assert report["chunked zig-zag anywhere"]["forward"] == 2 * 7 * (key + tag)
    ring = report["global zig-zag aligned"]
    assert ring["forward"] == 32 * (key + tag) and ring["training"] == 32 * (5 * key + 3 * tag)
    assert (ring["work_most"], report["global contiguous aligned"]["work_most"]) == (18, 26)  # of 36 pairs of blocks
    uneven = report["busiest_over_mean_of_packed_rows"]
    assert (uneven["zig-zag"]["1"], uneven["contiguous"]["1"]) == (1.0, 26 / 18)
    assert uneven["zig-zag"]["2"] > 1 and len(uneven["zig-zag"]) == 6
    assert report["of_a_ring_over_all_layers"]["contiguous aligned"] == 0.25
    assert "zig-zag     aligned                0             0       0.0%            1.00" in process.stdout
