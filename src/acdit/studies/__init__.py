"""The paper's figures in small: sweeps that train, measure and judge (`acdit study`, docs/studies.md)."""
