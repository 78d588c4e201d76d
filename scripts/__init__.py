"""What make and developers run; not part of the package."""
