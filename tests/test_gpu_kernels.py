"""What benchmarks/gpu_kernels.py reads off a program compiled for a GPU."""

import pytest
from conftest import ROOT

# A program of one kernel of each kind, as XLA writes them.
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_reduce (param_0: bf16[8,4,4,16]) -> f32[16] {
  %param_0 = bf16[8,4,4,16]{3,2,1,0} parameter(0)
  %convert.1 = f32[8,4,4,16]{3,2,1,0} convert(%param_0)
  %constant.1 = f32[] constant(0)
  ROOT %reduce.1 = f32[16]{0} reduce(%convert.1, %constant.1), dimensions={0,1,2}, to_apply=%add
}

%fused_first (param_0: bf16[8,4,4,16]) -> bf16[8,1,1,16] {
  %param_0 = bf16[8,4,4,16]{3,2,1,0} parameter(0)
  ROOT %slice.1 = bf16[8,1,1,16]{3,2,1,0} slice(%param_0), slice={[0:8], [0:1], [0:1], [0:16]}
}

%fused_dot (param_0: bf16[128,16], param_1: bf16[16,32]) -> bf16[128,32] {
  %param_0 = bf16[128,16]{1,0} parameter(0)
  %param_1 = bf16[16,32]{1,0} parameter(1)
  ROOT %dot.1 = bf16[128,32]{1,0} dot(%param_0, %param_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_conv (param_0: bf16[8,4,4,16], param_1: bf16[3,3,16,16]) -> bf16[8,4,4,16] {
  %param_0 = bf16[8,4,4,16]{3,2,1,0} parameter(0)
  %param_1 = bf16[3,3,16,16]{3,2,1,0} parameter(1)
  ROOT %convolution.1 = bf16[8,4,4,16]{3,2,1,0} convolution(%param_0, %param_1), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}

%inner (param_0: f32[16]) -> f32[16] {
  %param_0 = f32[16]{0} parameter(0)
  ROOT %copy.1 = f32[16]{0} copy(%param_0)
}

ENTRY %main (x: bf16[8,4,4,16], w: bf16[16,3,3,16], m: bf16[16,32]) -> (f32[16], bf16[128,32]) {
  %x = bf16[8,4,4,16]{3,2,1,0} parameter(0)
  %w = bf16[16,3,3,16]{3,2,1,0} parameter(1)
  %m = bf16[16,32]{1,0} parameter(2)
  %conv.1 = (bf16[8,4,4,16]{3,2,1,0}, u8[512]{0}) custom-call(%x, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", metadata={op_name="jit(step)/conv"}
  %get.1 = bf16[8,4,4,16]{3,2,1,0} get-tuple-element(%conv.1), index=0
  %conv.2 = (bf16[16,3,3,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %get.1), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %sums = f32[16]{0} fusion(%get.1), kind=kInput, calls=%fused_reduce
  %first = bf16[8,1,1,16]{3,2,1,0} fusion(%get.1), kind=kLoop, calls=%fused_first
  %rows = bf16[128,16]{1,0} bitcast(%get.1)
  %product.1 = (bf16[128,32]{1,0}, s8[4194304]{0}) custom-call(%rows, %m), custom_call_target="__cublas$lt$matmul"
  %product.2 = bf16[128,32]{1,0} fusion(%rows, %m), kind=kCustom, calls=%fused_dot
  %turned = bf16[3,3,16,16]{3,2,1,0} bitcast(%w)
  %conv.3 = bf16[8,4,4,16]{3,2,1,0} fusion(%x, %turned), kind=kCustom, calls=%fused_conv
  %moved = (f32[16]{0}, f32[16]{0}, u32[]) copy-start(%sums)
  %there = f32[16]{0} copy-done(%moved)
  %again = f32[16]{0} call(%sums), to_apply=%inner
  ROOT %tuple.1 = (f32[16]{0}, bf16[128,32]{1,0}) tuple(%again, %product.2)
}
"""  # noqa: E501


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_kernels

    return gpu_kernels


def test_kernels_of_a_program(script):
    found = {each.name: each for each in script.kernels(PROGRAM)}
    map_, filter_ = 2 * 8 * 4 * 4 * 16, 2 * 16 * 3 * 3 * 16
    convolution = 2 * (8 * 4 * 4 * 16) * (3 * 3 * 16)
    product = 2 * 128 * 16 * 32
    operands = map_ + 2 * 16 * 32
    assert {n: (k.kind, k.read, k.wrote, k.flops) for n, k in found.items()} == {
        "conv.1": ("convolution", map_ + filter_, map_, convolution),
        "conv.2": ("convolution", 2 * map_, filter_, convolution),
        "conv.3": ("convolution", map_ + filter_, map_, convolution),
        "moved": ("other", 4 * 16, 4 * 16, 0),
        "sums": ("reduction", map_, 4 * 16, 0),
        # Of what is only sliced, what is sliced out.
        "first": ("elementwise", 2 * 8 * 16, 2 * 8 * 16, 0),
        "product.1": ("matrix product", operands, 2 * 128 * 32, product),
        "product.2": ("matrix product", operands, 2 * 128 * 32, product),
        "copy.1": ("other", 4 * 16, 4 * 16, 0),
    }
    assert found["conv.1"].source == "jit(step)/conv"


def test_flops_of_batches_of_products(script):
    operands = ["f32[5,7,3,11]{3,2,1,0}", "f32[5,7,11,2]{3,2,1,0}"]
    assert script._product_flops(operands, "f32[5,7,3,2]{3,2,1,0}") == pytest.approx(
        2 * 5 * 7 * 3 * 2 * 11
    )


def test_what_is_not_read(script):
    with pytest.raises(ValueError, match="no compiled program"):
        script.kernels("HloModule nothing")
    loop = PROGRAM.replace("call(%sums), to_apply", "while(%sums), body")
    with pytest.raises(ValueError, match="again: how often it runs"):
        script.kernels(loop)


def test_the_row_of_a_program(script):
    import gpu_program

    class Program:
        def as_text(self):
            return PROGRAM

        def memory_analysis(self):
            return type("Memory", (), {"peak_memory_in_bytes": 3e9})

    row, kernels = gpu_program.measure(Program(), peak=1e12, bandwidth=1e12)
    assert row["kernels"] == row["small_kernels"] == len(kernels) == 9
    assert row["gb"] == pytest.approx(sum(k.bytes for k in kernels) / 1e9)
    # The convolutions and products are bound by arithmetic, the others by memory.
    bound = row["gflop"] * 1e9 + sum(k.bytes for k in kernels if not k.flops)
    assert row["least_ms"] == pytest.approx(1e3 * bound / 1e12)
    assert row["share_of_peak"] == pytest.approx(row["gflop"] * 1e9 / bound)
    assert row["peak_memory_gb"] == 3
    assert sum(row["gb_by_kind"].values()) == pytest.approx(row["gb"])
