"""The hub every zcore wheel stands on: contracts and shared plumbing. Import the submodule you need."""
