"""Operations on arrays: arrays in, arrays out. Each folder reads top down: api, reference, backends, workloads."""
