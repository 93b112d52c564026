"""The table of optimizers: one file per optimizer, and one line per optimizer here.

Each file defines `NameRule`, the pure rule with its `name`, and `Name`, the optimizer that runs the rule.
"""

from optim.rules.adabelief import AdaBelief, AdaBeliefRule
from optim.rules.adafactor import Adafactor, AdafactorRule
from optim.rules.adagrad import Adagrad, AdagradRule
from optim.rules.adahessian import AdaHessian, AdaHessianRule
from optim.rules.adam import Adam, AdamRule
from optim.rules.adam_atan2 import AdamAtan2, AdamAtan2Rule
from optim.rules.adam_mini import AdamMini, AdamMiniRule
from optim.rules.adamp import AdamP, AdamPRule
from optim.rules.adamw import AdamW, AdamWRule
from optim.rules.adamw_8bit import AdamW8bit, AdamW8bitRule
from optim.rules.ademamix import AdEMAMix, AdEMAMixRule
from optim.rules.adopt import ADOPT, ADOPTRule
from optim.rules.apollo import Apollo, ApolloRule
from optim.rules.blockwise_adam import BlockwiseAdam, BlockwiseAdamRule
from optim.rules.came import CAME, CAMERule
from optim.rules.conda import Conda, CondaRule
from optim.rules.dion import Dion, DionRule
from optim.rules.exadam import EXAdam, EXAdamRule
from optim.rules.fira import Fira, FiraRule
from optim.rules.galore import GaLore, GaLoreRule
from optim.rules.kron import Kron, KronRule
from optim.rules.lamb import LAMB, LAMBRule
from optim.rules.lars import LARS, LARSRule
from optim.rules.lion import Lion, LionRule
from optim.rules.lion_8bit import Lion8bit, Lion8bitRule
from optim.rules.mars import MARS, MARSRule
from optim.rules.muon import Muon, MuonRule
from optim.rules.muon_8bit import Muon8bit, Muon8bitRule
from optim.rules.nadam import NAdam, NAdamRule
from optim.rules.nadamw import NAdamW, NAdamWRule
from optim.rules.normuon import NorMuon, NorMuonRule
from optim.rules.onebit_adam import OneBitAdam, OneBitAdamRule
from optim.rules.prodigy import Prodigy, ProdigyRule
from optim.rules.rmnp import RMNP, RMNPRule
from optim.rules.rmsprop import RMSprop, RMSpropRule
from optim.rules.root import ROOT, ROOTRule
from optim.rules.scale import SCALE, SCALERule
from optim.rules.schedule_free_adamw import ScheduleFreeAdamW, ScheduleFreeAdamWRule
from optim.rules.schedule_free_sgd import ScheduleFreeSGD, ScheduleFreeSGDRule
from optim.rules.sgd import SGD, SGDRule
from optim.rules.sgd_sai import SGDSaI, SGDSaIRule
from optim.rules.sgdp import SGDP, SGDPRule
from optim.rules.shampoo import Shampoo, ShampooRule
from optim.rules.signsgd import SignSGD, SignSGDRule
from optim.rules.sinkgd import SinkGD, SinkGDRule
from optim.rules.soap import SOAP, SOAPRule
from optim.rules.sophia_g import SophiaG, SophiaGRule
from optim.rules.sophia_h import SophiaH, SophiaHRule
from optim.rules.spam import SPAM, SPAMRule
from optim.rules.stable_adamw import StableAdamW, StableAdamWRule
from optim.rules.stable_spam import StableSPAM, StableSPAMRule
from optim.rules.swan import SWAN, SWANRule
