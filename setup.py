from setuptools import find_packages, setup

setup(packages=find_packages(include=["ser_fast", "ser_fast.*"]))
