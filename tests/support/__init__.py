"""What tests share; registered as the package `support` by conftest.py."""
