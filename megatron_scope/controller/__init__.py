"""The process beside rank 0 that holds the data cursor, the rollout clients and the verifiers; ranks get
arrays from it.
"""
