"""What families of models differ in, beyond sizes. Nothing outside asks which family it is: it asks the family."""

from collections.abc import Mapping

from miniflux.families.family import Family
from miniflux.families.flux1 import FLUX1
from miniflux.families.flux2 import FLUX2
from miniflux.families.flux3 import FLUX3

FAMILIES: Mapping[str, Family] = {family.name: family for family in (FLUX1, FLUX2, FLUX3)}

__all__ = ["FAMILIES", "Family"]
