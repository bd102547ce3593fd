from semivim.layers.cross_scan import SS2D as SS2D
from semivim.layers.mamba import BidirectionalMamba as BidirectionalMamba
from semivim.layers.patch_embed import OverlapPatchEmbed as OverlapPatchEmbed
from semivim.layers.token_order import insert_middle as insert_middle
from semivim.layers.token_order import remove_middle as remove_middle
from semivim.layers.token_order import resample_pos_embed as resample_pos_embed
