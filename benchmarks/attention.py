"""Attention of one head over 16 x 16 pixels: PyTorch's own choice of a kernel beside two products and a softmax.

Heads of more than 256 channels, such as the 512 of the network for 256 x 256 images, have no flash attention.

    python benchmarks/attention.py [--device cuda] [--batch 1 8 32]
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

PIXELS = 16 * 16
HEADS = (256, 512)  # channels


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (N, 1, pixels, pixels)
    return weights.softmax(-1) @ v


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement, at least")
    args = parser.parse_args()
    print("| images | channels of a head | scaled_dot_product_attention, us | bmm, softmax, bmm, us | error |")
    print("| --- | --- | --- | --- | --- |")
    for channels in HEADS:
        for n in args.batch:
            given = [torch.randn(n, 1, PIXELS, channels, device=args.device, dtype=torch.bfloat16) for _ in range(3)]
            functions = (F.scaled_dot_product_attention, products)
            exact = products(*(x.double() for x in given))
            error = max((f(*given) - exact).norm() / exact.norm() for f in functions)
            medians = [
                Timer("f(*given)", globals={"f": f, "given": given}, num_threads=torch.get_num_threads())
                .blocked_autorange(min_run_time=args.seconds)
                .median
                for f in functions
            ]
            times = " | ".join(f"{seconds * 1e6:.1f}" for seconds in medians)
            print(f"| {n} | {channels} | {times} | {error:.1e} |", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
