"""The demo's rows, on the built-in model."""

from eckart.demo import run_demo


def test_a_row_of_the_demo() -> None:
    dense, small = run_demo(methods=["asvd-i"], keeps=[0.5])
    assert dense.method == "dense"
    assert dense.decode_speed == 1.0
    assert (small.method, small.keep) == ("asvd-i", 0.5)
    assert small.params < dense.params
    assert small.bytes == 2 * small.params
    assert small.in_domain > dense.in_domain
    assert small.out_of_domain > dense.out_of_domain
    assert small.decode_speed > 0
