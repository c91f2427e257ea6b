"""The mutual information of STD as a loss; it lives with the network that estimates it, see
`vmkd_fx.passes.heads.information`.
"""

from vmkd_fx.passes.heads.information import MutualInformationLoss, log_mean_exp, mutual_information

__all__ = ["MutualInformationLoss", "log_mean_exp", "mutual_information"]
