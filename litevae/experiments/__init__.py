"""The paper's tables and figures by name: each is a few training runs and the measurements of them."""
