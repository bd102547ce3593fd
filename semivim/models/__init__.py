from semivim.models.vim import Vim as Vim
