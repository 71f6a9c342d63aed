"""The conformance kit: the fp64 oracle, the cases made from a manifest, the checks, and the faults they must catch."""
