"""Writes small TFLite files, for the tests of their reader.

By the schema's numbers of fields; nothing of TensorFlow is needed.
"""

import flatbuffers
import numpy as np

TYPES = {"float32": 0, "int32": 2, "uint8": 3, "int8": 9}
CODES = {
    "CONCATENATION": (2, 10),
    "CONV_2D": (3, 1),
    "DEPTHWISE_CONV_2D": (4, 2),
    "FULLY_CONNECTED": (9, 8),
    "LOGISTIC": (14, 0),
    "QUANTIZE": (114, 0),
    "RESHAPE": (22, 17),
}
# The fields of options: place in the table, and the builder's method.
CONVOLUTION = {
    "padding": (0, "PrependInt8Slot"),
    "stride_w": (1, "PrependInt32Slot"),
    "stride_h": (2, "PrependInt32Slot"),
}
FIELDS = {
    "CONCATENATION": {"axis": (0, "PrependInt32Slot")},
    "CONV_2D": {**CONVOLUTION, "activation": (3, "PrependInt8Slot")},
    "DEPTHWISE_CONV_2D": {
        **CONVOLUTION,
        "depth_multiplier": (3, "PrependInt32Slot"),
        "activation": (4, "PrependInt8Slot"),
    },
    "FULLY_CONNECTED": {"activation": (0, "PrependInt8Slot")},
    "LOGISTIC": {},
    "QUANTIZE": {},
    "RESHAPE": {},
}


def write(tensors, operations, inputs, outputs):
    """The bytes of a network.

    Args:
      tensors: dictionaries with "shape", "dtype" and, where there are any, "data",
        "scale", "zero_point" and "axis".
      operations: (name, numbers of inputs, of outputs, options).
      inputs: numbers of the tensors that the network takes.
      outputs: numbers of those that it returns.
    """
    builder = flatbuffers.Builder(1024)
    names = sorted({operation[0] for operation in operations})
    graph = _graph(builder, tensors, operations, names, inputs, outputs)
    codes = [_code(builder, CODES[name][0]) for name in names]
    buffers = [_buffer(builder, None)]
    buffers += [_buffer(builder, tensor.get("data")) for tensor in tensors]
    codes, graphs, buffers = (
        _tables(builder, tables) for tables in (codes, [graph], buffers)
    )
    builder.StartObject(5)
    builder.PrependUint32Slot(0, 3, 0)
    for place, table in ((1, codes), (2, graphs), (4, buffers)):
        builder.PrependUOffsetTRelativeSlot(place, table, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _graph(builder, tensors, operations, names, inputs, outputs):
    made = [_tensor(builder, tensor, i + 1) for i, tensor in enumerate(tensors)]
    steps = [_operation(builder, step, names.index(step[0])) for step in operations]
    made, steps = _tables(builder, made), _tables(builder, steps)
    ends = [_vector(builder, np.int32(numbers)) for numbers in (inputs, outputs)]
    builder.StartObject(5)
    for place, table in enumerate((made, *ends, steps)):
        builder.PrependUOffsetTRelativeSlot(place, table, 0)
    return builder.EndObject()


def _tensor(builder, tensor, buffer):
    shape = _vector(builder, np.int32(tensor["shape"]))
    name = builder.CreateString(f"tensor_{buffer}")
    grid = None
    if "scale" in tensor:
        scale = np.atleast_1d(np.float32(tensor["scale"]))
        zero = np.broadcast_to(np.int64(tensor.get("zero_point", 0)), scale.shape)
        parts = _vector(builder, scale), _vector(builder, np.array(zero))
        builder.StartObject(7)
        for place, part in zip((2, 3), parts, strict=True):
            builder.PrependUOffsetTRelativeSlot(place, part, 0)
        builder.PrependInt32Slot(6, tensor.get("axis", 0), 0)
        grid = builder.EndObject()
    builder.StartObject(8)
    builder.PrependUOffsetTRelativeSlot(0, shape, 0)
    builder.PrependInt8Slot(1, TYPES[tensor["dtype"]], 0)
    builder.PrependUint32Slot(2, buffer, 0)
    builder.PrependUOffsetTRelativeSlot(3, name, 0)
    if grid is not None:
        builder.PrependUOffsetTRelativeSlot(4, grid, 0)
    return builder.EndObject()


def _operation(builder, operation, index):
    name, inputs, outputs, options = operation
    builder.StartObject(8)
    for field, value in options.items():
        place, method = FIELDS[name][field]
        getattr(builder, method)(place, value, 0)
    given = builder.EndObject()
    ends = [_vector(builder, np.int32(numbers)) for numbers in (inputs, outputs)]
    builder.StartObject(5)
    builder.PrependUint32Slot(0, index, 0)
    for place, vector in zip((1, 2), ends, strict=True):
        builder.PrependUOffsetTRelativeSlot(place, vector, 0)
    builder.PrependUint8Slot(3, CODES[name][1], 0)
    builder.PrependUOffsetTRelativeSlot(4, given, 0)
    return builder.EndObject()


def _code(builder, number):
    builder.StartObject(4)
    builder.PrependInt8Slot(0, min(number, 127), 0)
    builder.PrependInt32Slot(2, 1, 1)
    builder.PrependInt32Slot(3, number, 0)
    return builder.EndObject()


def _buffer(builder, data):
    content = None if data is None else _vector(builder, _octets(data))
    builder.StartObject(3)
    if content is not None:
        builder.PrependUOffsetTRelativeSlot(0, content, 0)
    return builder.EndObject()


def _octets(data):
    return np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)


def _vector(builder, numbers):
    return builder.CreateNumpyVector(np.atleast_1d(numbers))


def _tables(builder, tables):
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    return builder.EndVector()
