"""Contracts that every engine is held to, for the tests of engines (pytest) in this project and elsewhere.

from chest.testing.exclusive import TransactionContract
from chest.testing.index import IndexContract

class TestMine(IndexContract, TransactionContract):
    def make_index(self, folder):
        return MyIndex(folder)
"""
