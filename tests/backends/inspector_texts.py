"""What engine inspectors of several versions say, written in the form that these sources show; none was recorded by us.

8.5   names only, and no "Metadata": NVIDIA/TensorRT issue 4020 and trt-samples-for-hackathon-cn issue 18; in detail:
      tools/experimental/trt-engine-explorer/examples/pytorch/resnet/A100 in NVIDIA/TensorRT (8.4, ResNet-18 with Q/DQ).
8.6   "Metadata" joined by \\x1e: ILayer.metadata is an attribute from 8.6 on; the Developer Guide's "Engine Inspector".
10.x  NVIDIA/TensorRT issue 4020 (trtexec of the container 24.06: "Location", "StreamId", "Metadata"), and the one-word
      types of Myelin's layers as docs.nvidia.com/deeplearning/tensorrt/10.16.1/inference-library/engine-tools.html.
11.x  docs.nvidia.com/deeplearning/tensorrt/11.3.0/api/migration/tensorrt-10x-to-11x-IEngineInspector.html: "Bindings"
      became "I/O Tensors", and "Format/Datatype" was split.

The network is one: x -> Conv /c1 -> Relu -> Conv /c2 + skip -> Relu -> mean -> Gemm /fc, with pairs at x, r1, r2 and f.
"""

import json

_WIDE8 = "Thirty-two wide channel vectorized row major Int8 format"
_FP32 = "Row major linear FP32"


def _old(name: str, layout: str, *, is_located: bool = True) -> dict:
    where = {"Location": "Device"} if is_located else {}
    return {"Name": name, **where, "Dimensions": [1, 16, 32, 32], "Format/Datatype": layout}


NAMES_ONLY = json.dumps({
    "Layers": [
        "x/quantize",
        "c1.weight + c1.weight/quantize + /c1/Conv + /r1/Relu",
        "c2.weight + c2.weight/quantize + /c2/Conv + /Add + /r2/Relu",
        "Reformatting CopyNode for Input Tensor 0 to /gap",
        "PWN(PWN(/gate/Sigmoid), /gate/Mul)",
        "{ForeignNode[/norm/ReduceMean.../norm/Add]}",
    ],
    "Bindings": ["x", "y"],
})  # fmt: skip

# TensorRT 8.5: the Gemm was left in half floats by the builder.
DETAILED_85 = json.dumps({
    "Layers": [
        {
            "Name": "x/quantize", "LayerType": "Reformat",
            "Inputs": [_old("x", _FP32)], "Outputs": [_old("x/stored", "Row major Int8 format")],
            "ParameterType": "Reformat", "Origin": "QDQ", "TacticValue": "0x00000000000003ea",
        },
        {
            "Name": "c1.weight + c1.weight/quantize + /c1/Conv + /r1/Relu", "LayerType": "CaskConvolution",
            "Inputs": [_old("x/stored", "Row major Int8 format")], "Outputs": [_old("r1/stored", _WIDE8)],
            "ParameterType": "Convolution", "Kernel": [3, 3], "Weights": {"Type": "Int8", "Count": 432},
            "Bias": {"Type": "Float", "Count": 16}, "Activation": "RELU",
            "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_tilesize96x64x64",
            "TacticValue": "0x1111111111111111",
        },
        {
            "Name": "c2.weight + c2.weight/quantize + /c2/Conv + /Add + /r2/Relu", "LayerType": "CaskConvolution",
            "Inputs": [_old("r1/stored", _WIDE8), _old("r1", "Channel major FP16 format where channel % 8 == 0")],
            "Outputs": [_old("r2/stored", _WIDE8)], "Weights": {"Type": "Int8", "Count": 2304},
            "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_tilesize64x64x64",
        },
        {
            "Name": "/gap", "LayerType": "PoolingV2",
            "Inputs": [_old("r2/stored", _WIDE8)], "Outputs": [_old("g", "Two wide channel vectorized row major FP16 format")],
        },
        {
            "Name": "fc.weight + fc.weight/quantize + /fc/Gemm", "LayerType": "CaskGemmConvolution",
            "Inputs": [_old("f", "Row major linear FP16 format")], "Outputs": [_old("y", _FP32)],
            "Weights": {"Type": "Half", "Count": 160}, "TacticName": "sm80_xmma_gemm_f16f16_f16f32_f32_tn",
        },
    ],
    "Bindings": ["x", "y"],
})  # fmt: skip

# TensorRT 8.6 with an open batch and no execution context: types are not told, the weights' are.
OPEN_86 = json.dumps({
    "Layers": [
        {
            "Name": "/c1/Conv + /r1/Relu", "LayerType": "CaskConvolution",
            "Inputs": [_old("x/stored", "N/A due to dynamic shapes", is_located=False)],
            "Outputs": [_old("r1/stored", "N/A due to dynamic shapes", is_located=False)],
            "Weights": {"Type": "Int8", "Count": 432}, "TacticName": "", "TacticValue": "0x0",
            "Metadata": "[ONNX Layer: c1.weight/dequantize]\x1e[ONNX Layer: /c1/Conv]\x1e[ONNX Layer: /r1/Relu]",
        },
        {
            "Name": "/c2/Conv", "LayerType": "CaskConvolution", "Inputs": [], "Outputs": [],
            "TacticName": "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "Metadata": "[ONNX Layer: /c2/Conv]",
        },
    ],
    "Bindings": ["x", "y", "x [profile 1]", "y [profile 1]"],
})  # fmt: skip


def _myelin(name: str, dtype: str, layout: str = "") -> dict:
    return {
        "Name": name,
        "Location": "Device",
        "Dimensions": [1, 16, 32, 32],
        **({"Format": layout, "Datatype": dtype} if layout else {"Format/Datatype": dtype}),
    }


def _layers(layout: str) -> list:
    """The same kernels as 10.x and, with the type apart from the format, as 11.x tell them."""

    def layer(name, kind, reads, writes, nodes, tactic="__myl_tactic"):
        return {
            "Name": name, "LayerType": kind, "Inputs": [_myelin(*one, layout) for one in reads],
            "Outputs": [_myelin(*one, layout) for one in writes], "TacticName": tactic, "StreamId": 0,
            "Metadata": "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes),
        }  # fmt: skip

    return [
        layer("__myl_Quan_myl0_0", "kgen", [("x", "Float")], [("x/stored", "Int8")], ["x/quantize"]),
        layer("/c1/Conv_myl0_1", "conv", [("a", "Int8")], [("b", "Int8")],
              ["/c1/Conv", "x/dequantize", "c1.weight/dequantize", "/r1/Relu", "r1/quantize"]),
        layer("/c2/Conv_myl0_2", "fusion", [("b", "Int8"), ("r1", "Half")], [("c", "Half")],
              ["/c2/Conv", "r1/dequantize", "c2.weight/dequantize", "/Add", "/r2/Relu"]),
        layer("__myl_MeanQuan_myl0_3", "kgen", [("c", "Half")], [("d", "Half")],
              ["r2/quantize", "r2/dequantize", "/gap"]),
        layer("/fc/Gemm_myl0_4", "gemm", [("d", "Half")], [("y", "Float")], ["/fc/Gemm"],
              "sm80_xmma_gemm_f16f16_f16f32_f32_tn"),
    ]  # fmt: skip


DETAILED_10 = json.dumps({"Layers": _layers(""), "Bindings": ["x", "y"]})
DETAILED_11 = json.dumps({
    "Layers": _layers("Row major linear format"),
    "I/O Tensors": [
        {"Name": "x", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 3, 32, 32], "Location": "Device",
         "IsShapeInferenceIO": False, "ProfileInfo": []},
        {"Name": "y", "IOMode": "Output", "DataType": "Float", "Dimensions": [1, 10], "Location": "Device",
         "IsShapeInferenceIO": False, "ProfileInfo": []},
    ],
    "Engine Metadata": {"Multi-Device": "Disabled"},
})  # fmt: skip

# Recorded here: the end of a build by TensorRT-RTX 1.7.1.116 for SM86, of a convolution without a GPU.
RTX_LOG = """\
[I] Engine generation completed in 0.0484375 seconds.
[V] Layers:
Name: __myl_MulMinMaxRounCastConc_myl0_0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [1,3,32,32], Strides: \
[3072,1024,32,1], StrideOrder: [3,2,1,0], Datatype: Float, Format: (Linear) Row major linear format }], Constants: [ { Name: \
__mye1215_myl0, Dimensions: [1,1,32,32], Strides: [1024,1,32,1], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) \
Channel major format }, { Name: __mye1277_const-lit-in_myl0, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, \
Format: (Linear) Row major linear format }], Outputs: [ { Name: __mye899c1_out_before_bias.1_2_myl0, Dimensions: [1,4,32,32], \
Strides: [4096,1,128,4], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], TacticName: \
__myl_MulMinMaxRounCastConc_0x3776631560d928cd372e425b53ecf625, StreamId: 0, Metadata: [ONNX Layer: x/quantize][ONNX Layer: \
/c1/Conv][ONNX Layer: x/dequantize][ONNX Layer: c1.weight/dequantize]
Name: /c1/Conv_myl0_1, LayerType: correlation, Inputs: [ { Name: __mye899c1_out_before_bias.1_2_myl0, Dimensions: [1,4,32,32], \
Strides: [4096,1,128,4], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], Constants: [ { Name: \
__mye1229_dconst_myl0, Dimensions: [16,4,3,3], Strides: [36,1,12,4], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) \
Channel major format }], Outputs: [ { Name: __myln_k_arg__bb1_3_myl0, Dimensions: [1,16,32,32], Strides: [16384,1,512,16], \
StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], TacticName: __myelin_CASK_STUB, StreamId: 0, \
Metadata: [ONNX Layer: /c1/Conv][ONNX Layer: x/dequantize][ONNX Layer: c1.weight/dequantize]
Name: __myl_Move_myl0_6, LayerType: kgen, Inputs: [ { Name: a, Dimensions: [1,16], Datatype: Int8, Format: (Arbitrary) Format \
with stride order = [4,1,0,3,2] }], Constants: [], Outputs: [ { Name: b, Dimensions: [1,16], Datatype: Int8, Format: (Linear) \
Row major linear format }], TacticName: __myl_Move_0xc47c, StreamId: 0, Metadata:\x20

I/O Tensors:
 Name: x, IOMode: Input, DataType: Float, Dimensions: [1,3,32,32], Location: Device, IsShapeInferenceIO: false
"""
