"""The C interface from another language: python check_ctypes.py LIBRARY WEIGHTS PICTURE prints the logits.

Declares the functions as a user would; needs nothing but the shared library.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p


class Info(ctypes.Structure):
    _fields_ = [
        (name, c_int64)
        for name in ("channels", "height", "width", "outputs", "classes", "tokens", "embed_dim")
    ]


OK, INVALID_ARGUMENT, FAILED = 0, 1, 2
ARGUMENTS = {
    "model_load": [c_char_p, c_char_p, c_int64, c_int64, POINTER(c_void_p)],
    "model_get_info": [c_void_p, POINTER(Info)],
    "model_label": [c_void_p, c_int64, POINTER(c_char_p)],
    "model_metadata": [c_void_p, c_char_p, POINTER(c_char_p)],
    "load_image": [c_void_p, c_char_p, POINTER(c_float), c_size_t],
    "decode_image": [c_void_p, c_char_p, c_size_t, POINTER(c_float), c_size_t],
    "session_create": [c_void_p, c_int, c_int64, c_char_p, POINTER(c_void_p)],
    "session_run": [c_void_p, POINTER(c_float), c_int64, POINTER(c_float), c_size_t],
    "session_features": [c_void_p, POINTER(c_float), c_int64, POINTER(c_float), c_size_t],
    "model_destroy": [c_void_p],
    "session_destroy": [c_void_p],
}


def main(library: str, weights: str, picture: str) -> None:
    lib = ctypes.CDLL(library)
    for name, arguments in ARGUMENTS.items():
        getattr(lib, f"vimcore_{name}").argtypes = arguments
    lib.vimcore_version.restype = lib.vimcore_last_error.restype = c_char_p
    assert lib.vimcore_version().count(b".") == 2

    model, session, info, text = c_void_p(), c_void_p(), Info(), c_char_p()
    assert lib.vimcore_model_load(b"no such file", b"cpu", 0, 0, byref(model)) == FAILED
    assert b"no such file" in lib.vimcore_last_error()
    assert not model
    status = lib.vimcore_model_load(weights.encode(), b"cpu", 0, 0, byref(model))
    assert status == OK, lib.vimcore_last_error()
    assert lib.vimcore_model_get_info(model, byref(info)) == OK
    assert lib.vimcore_model_label(model, 3, byref(text)) == OK
    assert text.value == b"3"
    assert lib.vimcore_model_metadata(model, b"vimcore.config", byref(text)) == OK
    assert b"depth" in (text.value or b"")

    pixels, outputs = info.channels * info.height * info.width, info.outputs
    image, again, logits = (c_float * pixels)(), (c_float * pixels)(), (c_float * outputs)()
    tokens = (c_float * (info.tokens * info.embed_dim))()
    with open(picture, "rb") as file:
        data = file.read()
    assert lib.vimcore_load_image(model, picture.encode(), image, pixels) == OK, lib.vimcore_last_error()
    assert lib.vimcore_decode_image(model, data, len(data), again, pixels) == OK
    assert list(image) == list(again)
    assert lib.vimcore_session_create(model, 0, 1, None, byref(session)) == OK
    assert lib.vimcore_session_run(session, image, 1, logits, outputs - 1) == INVALID_ARGUMENT
    assert b"capacity" in lib.vimcore_last_error()
    assert lib.vimcore_session_run(session, image, 1, logits, outputs) == OK
    assert lib.vimcore_session_features(session, image, 1, tokens, len(tokens)) == OK
    assert any(tokens)
    lib.vimcore_model_destroy(model)
    assert lib.vimcore_session_run(session, image, 1, logits, outputs) == OK  # the session keeps its model
    lib.vimcore_session_destroy(session)
    assert lib.vimcore_session_run(session, image, 1, logits, outputs) == INVALID_ARGUMENT
    print("\n".join(f"{value:.9g}" for value in logits))


if __name__ == "__main__":
    main(*sys.argv[1:])
