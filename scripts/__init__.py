"""Scripts for make and for developers; not part of the package."""
