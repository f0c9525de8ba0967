"""The contract of a parameterization as checks; shipped, so that a method from outside can prove itself.

from adaptrank.testing import check_parameterization
check_parameterization(MyMethod)
"""

from adaptrank.testing.contract import *  # noqa: F403
