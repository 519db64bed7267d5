"""What the description in an engine says about its products."""

from qcompiler.export.engine_graph import EngineProduct, products_of

FILLER = " " * 200
DESCRIPTION = """descriptors {
  tensor={ alignment=128 dims={ 4 8 } mem_prop=0 name="x.1" offset=0 strides={ 8 1 } type=int8 }
  tensor={ alignment=128 const_payload_size=64 dims={ 8 8 } name="w" offset=0 type=int8 }
  tensor={ alignment=128 dims={ 4 8 } name="h" offset=0 type=half }
}
main {
  function={ name=__myl_Mul args={ "x.1" } layers="[ONNX Layer: q]\x1f[ONNX Layer: d]" }
  fully_connected={ name="k+v" output={"o" } input={"x.1" "w" "alpha" } stream=0 }
  corrltn={ name="c" output={"o" } input={"y^deref" "w" } stream=0 }
  fully_connected={ name="s" output={"o" } input={"h" "h" } stream=0 }
}
"""


def test_names_and_types_of_products() -> None:
    engine = b"\x00\xff" + (DESCRIPTION + FILLER).encode() + b"\x00weights"
    merged, convolution, half = products_of(engine)
    assert merged == EngineProduct(("k", "v"), "MatMul", ("int8", "int8"))
    assert convolution == EngineProduct(("c",), "Conv", ("", "int8"))
    assert half == EngineProduct(("s",), "MatMul", ("half", "half"))
    kinds = [product.multiplies_integers for product in (merged, convolution, half)]
    assert kinds == [True, True, False]


def test_an_engine_without_a_description_says_nothing() -> None:
    assert products_of(bytes(range(256)) * 8) == ()
    assert products_of(b"") == ()
